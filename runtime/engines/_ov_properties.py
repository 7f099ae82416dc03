"""What OpenVINO's plugin is told: threads, and the precisions that it would choose by the machine.

Left to itself the CPU plugin keeps the cache in 8 bits, may compute in bf16 and quantize activations, depending on the
machine; with ``precise`` all of that is float32, so that numbers can be compared.

Source: plugin properties at https://docs.openvino.ai; tests/runtime/test_greedy_reference.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from roundexport.environment.openvino_import import import_openvino
from roundexport.errors import UsageError
from roundexport.runtime.types import EngineOptions

if TYPE_CHECKING:
    import openvino as ov

PRECISIONS = {
    "activations": "INFERENCE_PRECISION_HINT",
    "kv_cache": "KV_CACHE_PRECISION",
    "dynamic_quantization_group_size": "DYNAMIC_QUANTIZATION_GROUP_SIZE",
}
"""Properties that decide how exact a graph is, by what `info` calls them."""
_BOTH_CACHES = "KV_CACHE_PRECISION"
_GROUP = "DYNAMIC_QUANTIZATION_GROUP_SIZE"  # the plugin's own where some products' activations are in eight bits
_PRECISE = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "KEY_CACHE_PRECISION": "f32",
    "VALUE_CACHE_PRECISION": "f32",
    _GROUP: 0,
}
_CROSS = {_BOTH_CACHES: "f32"}
_CROSS_TAKES = ("f32", "f16", "bf16")


def properties(core: ov.Core, device: str, options: EngineOptions, cross: bool = False) -> dict[str, Any]:
    """What a graph is compiled with; what was asked for is in it as it was asked.

    Args:
        core: OpenVINO.
        device: in its name for it.
        options: what was asked for.
        cross: the graph has cross-attention, whose cache may not have 8 bits; see _ov_seq2seq.py.

    Raises:
        UsageError: the device's plugin has no property of a name that was given, or does not take its value, or would
            give wrong rows with it.
    """
    known = set(core.get_property(device, "SUPPORTED_PROPERTIES"))
    wanted: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if options.threads is not None:
        wanted["INFERENCE_NUM_THREADS"] = options.threads
    if options.precise:
        wanted |= {name: value for name, value in _PRECISE.items() if name != _GROUP or not options.int8_products}
    if cross:
        wanted |= _CROSS
        _check_cross(options.properties)
    if options.profile:
        wanted["PERF_COUNT"] = True
    if _BOTH_CACHES in options.properties:  # else the more exact names would win over what was asked for
        wanted = {name: value for name, value in wanted.items() if not name.endswith(_BOTH_CACHES.removeprefix("KV"))}
    _check_given(core, device, options.properties)
    return {name: value for name, value in wanted.items() if name in known} | dict(options.properties)


def _check_cross(given: Mapping[str, str]) -> None:
    for name, value in given.items():
        if name.endswith("CACHE_PRECISION") and value not in _CROSS_TAKES:
            raise UsageError(
                f"OpenVINO's property {name} {value}: beside cross-attention a cache of so few bits gives wrong rows; "
                f"of a model with an encoder and a decoder it takes {', '.join(_CROSS_TAKES)}"
            )


def _check_given(core: ov.Core, device: str, given: Mapping[str, str]) -> None:
    access = core.get_property(device, "SUPPORTED_PROPERTIES") if given else {}
    writable = sorted(name for name in access if access[name] == "RW")
    for name, value in given.items():
        if name not in writable:
            raise UsageError(f"OpenVINO's plugin for {device} has no property {name!r} to set; it has {writable}")
        try:
            core.set_property(device, {name: value})
        except RuntimeError as error:
            said = str(error).strip().splitlines()[-1].strip()
            raise UsageError(f"OpenVINO's property {name} does not take {value!r}: {said}") from error


def stated(core: ov.Core, device: str, options: EngineOptions, model: ov.Model) -> dict[str, Any]:
    """The same with every precision said: where it is not to be precise the graph's own, and else the plugin's.

    For libraries that compile the graph themselves and do not show it, so that what is in effect is known.  What is
    said wins over what a graph asks for in its runtime options, so that must be said again.
    """
    known = set(core.get_property(device, "SUPPORTED_PROPERTIES"))
    own = {name: plain(core.get_property(device, name)) for name in PRECISIONS.values() if name in known}
    return own | _asked(model, own) | properties(core, device, options)


def _asked(model: ov.Model, names: Iterable[str]) -> dict[str, Any]:
    """What a graph asks for in its runtime options, which are texts."""
    paths = {name: ["runtime_options", name] for name in names}
    texts = {name: model.get_rt_info(path).astype(str) for name, path in paths.items() if model.has_rt_info(path)}
    return {name: int(text) if text.isdecimal() else text for name, text in texts.items()}


def plain(value: Any) -> str | int:
    """A property's value for JSON: element types by their names."""
    if isinstance(value, import_openvino().Type):
        return str(value.to_string())
    return value if isinstance(value, int) else str(value)
