"""compressed-tensors: what llm-compressor and auto-round (`--format llm_compressor`) write of integers.

    quant_method compressed-tensors     config_groups: targets -> weights {num_bits, type int, symmetric, strategy, …}
    pack-quantized      weight_packed [N, ⌈K·b/32⌉] I32 along K, weight_shape [2], weight_scale [N, G];
                        weight_zero_point [⌈N·b/32⌉, G] I32 along N, where not symmetric
    int-quantized,      weight [N, K] I8, weight_scale [N, G], weight_zero_point [N, G] I8
    naive-quantized

Codes and zero points are signed there; here 2^(b-1) is added to both, which is how they are packed too.  Of strategy
`channel` G is 1, of `tensor` one scale is repeated for every row; `group` may have a weight_g_idx (_gptq_layout.py).

Quantized activations are not carried over, which is said.  Refused: floats, transforms and sparsity that a runtime
would have to undo, quantized KV caches, blocks in two directions.
Source: compressors/ and quantization/ of compressed-tensors 0.19.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import CheckpointError, UnsupportedError
from roundexport.quant.packing import pack_codes
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import BITS
from roundexport.quant.word_packing import WORD_BITS, stream_of_columns, stream_of_rows, unpack_stream

from ._gptq_layout import Scheme, assembled, checked_scheme, group_order
from .interface import ForeignLinear, Importer, QuantizedFolder, group_size_for

_START = "start from the float model: roundexport tune"
_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
_STRATEGIES = ("group", "channel", "tensor")
_FLOATS = ("F16", "BF16", "F32")
_WRONG = {
    "kv_cache_scheme": "a quantized KV cache is the runtime's own affair in packages",
    "transform_config": "it rotates weights and activations while the model runs",
}


def _recognizes(config: Mapping[str, Any]) -> bool:
    return config.get("quant_method") == "compressed-tensors"


def _layers(folder: QuantizedFolder) -> Sequence[ForeignLinear]:
    config, where = folder.config, folder.location
    for key, why in _WRONG.items():
        if config.get(key):
            raise UnsupportedError(f"{where}: {key} is set, which is not carried over ({why}); {_START}")
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise UnsupportedError(f"{where}: sparse weights ({sparsity['format']}) are not read; {_START}")
    found = [_layer(folder, module, *_scheme_of(module, config, where)) for module in _modules(folder)]
    if not found:
        raise CheckpointError(f"{where}: quantization_config says quantized, but no layer has packed or int8 weights")
    return found


def _notes(folder: QuantizedFolder) -> Sequence[str]:
    groups = _groups(folder.config, folder.location)
    if not any(group.get("input_activations") for group in groups):
        return ()
    return (
        "its activations were quantized too (input_activations); that is not carried over: packages quantize "
        "activations by their runtime's own rules",
    )


def _modules(folder: QuantizedFolder) -> Iterator[str]:
    tensors = folder.tensors
    yield from tensors.modules_with("weight_packed")
    for module in tensors.modules_with("weight_scale"):
        weight = f"{module}.weight"
        if weight not in tensors:
            continue
        if tensors.dtype(weight) != "I8":
            raise UnsupportedError(
                f"{folder.location}: {weight} is {tensors.dtype(weight)} with a scale; only integers are read; {_START}"
            )
        yield module


def _groups(config: Mapping[str, Any], where: str) -> Sequence[Mapping[str, Any]]:
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise CheckpointError(f"{where}: quantization_config has no config_groups")
    return list(groups.values())


def _scheme_of(module: str, config: Mapping[str, Any], where: str) -> tuple[Scheme, str, bool]:
    """Scheme and format of a module, and whether it has one scale for all."""
    groups = _groups(config, where)
    ranked = sorted((rank, number) for number, group in enumerate(groups) if (rank := _rank(group, module, where)) < 3)
    if not ranked:
        raise CheckpointError(f"{where}: no group of config_groups has {module} among its targets, but it is quantized")
    group = groups[ranked[0][1]]
    weights, form = group.get("weights"), group.get("format") or config.get("format")
    if form not in _FORMATS:
        raise UnsupportedError(f"{where}: the format {form!r} is not read; {', '.join(_FORMATS)} are; {_START}")
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{where}: the group of {module} has no weights")
    if weights.get("type", "int") != "int":
        raise UnsupportedError(
            f"{where}: {module} holds {weights['type']} weights; only integers are imported; {_START}"
        )
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    if strategy not in _STRATEGIES:
        raise UnsupportedError(f"{where}: the strategy {strategy!r} of {module} is not read; {_START}")
    size = weights.get("group_size") if strategy == "group" else -1
    scheme = checked_scheme(weights.get("num_bits", 8), size, weights.get("symmetric", True), 0, f"{where}: {module}")
    return scheme, form, strategy == "tensor"


def _rank(group: Mapping[str, Any], module: str, where: str) -> int:
    """How a group names a module: 0 by its path, 1 by a pattern, 2 by its class, 3 not at all."""
    ranks = [3]
    for target in group.get("targets") or ():
        if target == module:
            ranks.append(0)
        elif isinstance(target, str) and target.startswith("re:"):
            try:
                ranks += [1] if re.match(target.removeprefix("re:"), module) else []
            except re.error as error:
                raise CheckpointError(f"{where}: target {target!r} is not a regular expression: {error}") from error
        elif target in ("Linear", "Embedding"):
            ranks.append(2)
    return min(ranks)


def _layer(folder: QuantizedFolder, module: str, scheme: Scheme, form: str, one_scale: bool) -> ForeignLinear:
    tensors, bits, where = folder.tensors, scheme.bits, f"{folder.location}: {module}"
    packed = f"{module}.weight_packed" in tensors
    name = f"{module}.weight_packed" if packed else f"{module}.weight"
    rows, width = tensors.matrix_shape(name)
    parts = [name, f"{module}.weight_scale"]
    if packed:
        width = _stated_width(folder, module, rows)
        tensors.check(name, ("I32",), (rows, -(-width * bits // WORD_BITS)))
        parts.append(f"{module}.weight_shape")
    group, _ = group_size_for(scheme.group_size, width, where)
    groups = 1 if group is None else width // scheme.group_size
    grid = (1,) if one_scale else (rows, groups)
    if one_scale and tensors.shape(parts[1]) == (1, 1):
        grid = (1, 1)
    tensors.check(parts[1], _FLOATS, grid)
    zero = f"{module}.weight_zero_point"
    if zero in tensors:
        whole = packed and not one_scale
        tensors.check(zero, ("I32",) if whole else ("I8",), (-(-rows * bits // WORD_BITS), groups) if whole else grid)
        parts.append(zero)
    elif not scheme.symmetric:
        raise CheckpointError(f"{where}: quantization_config says asymmetric, but there is no weight_zero_point")
    if f"{module}.weight_g_idx" in tensors:
        tensors.check(f"{module}.weight_g_idx", ("I32", "I64"), (width,))
        parts.append(f"{module}.weight_g_idx")
    parts += [own for part in _OF_ACTIVATIONS if (own := f"{module}.{part}") in tensors]

    def read() -> QuantizedLinear:
        scales = np.broadcast_to(
            tensors.scales(parts[1], grid).reshape(grid if len(grid) == 2 else (1, 1)), (rows, groups)
        )
        points = _zero_points(folder, module, scheme, (rows, groups))
        if f"{module}.weight_g_idx" in tensors and groups > 1:
            order = group_order(tensors.read(f"{module}.weight_g_idx"), groups, where)
            scales, points = scales[:, order], points[:, order]
        return assembled(_codes(folder, name, scheme, width), scales, points, scheme, width, where)

    return ForeignLinear(module, rows, width, tuple(parts), read)


def _stated_width(folder: QuantizedFolder, module: str, rows: int) -> int:
    """K, which only weight_shape tells where codes do not fill their last word."""
    name = f"{module}.weight_shape"
    folder.tensors.check(name, ("I64", "I32"), (2,))
    stated = [int(size) for size in folder.tensors.read(name)]
    if stated[0] != rows or stated[1] < 1:
        raise CheckpointError(f"{folder.location}: {name} says {stated}, weight_packed has {rows} rows")
    return stated[1]


def _codes(folder: QuantizedFolder, name: str, scheme: Scheme, width: int) -> NDArray[np.uint8]:
    """Codes as a packed stream per row, of 8 bits where the scheme's width is not one of ours."""
    bits, own = scheme.bits, scheme.bits if scheme.bits in BITS else 8
    values = folder.tensors.read(name)
    if values.dtype == np.int8:
        return pack_codes(_unsigned(values, bits, f"{folder.location}: {name}"), own)
    stream = stream_of_rows(values)
    return stream if own == bits else pack_codes(unpack_stream(stream, bits, width), own)


def _zero_points(folder: QuantizedFolder, module: str, scheme: Scheme, grid: tuple[int, int]) -> NDArray[np.uint8]:
    name = f"{module}.weight_zero_point"
    if name not in folder.tensors:
        return np.full(grid, 1 << (scheme.bits - 1), np.uint8)
    values = folder.tensors.read(name)
    if values.dtype == np.int8:
        unsigned = _unsigned(values.reshape(1, 1) if values.size == 1 else values, scheme.bits, name)
        return np.broadcast_to(unsigned, grid)
    return unpack_stream(stream_of_columns(values), scheme.bits, grid[0]).T


def _unsigned(values: NDArray[np.int8], bits: int, where: str) -> NDArray[np.uint8]:
    middle = 1 << (bits - 1)
    if values.size and (int(values.min()) < -middle or int(values.max()) >= middle):
        raise CheckpointError(f"{where} holds {int(values.min())} to {int(values.max())}, beyond {bits} bits")
    return (values.astype(np.int16) + middle).astype(np.uint8)


IMPORTER = Importer("compressed-tensors", _recognizes, _layers, _notes)
