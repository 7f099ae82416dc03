"""GPTQ: what AutoGPTQ, GPTQModel and auto-round (`--format auto_gptq`) write, of 2, 3, 4 and 8 bits.

    quant_method gptq     bits, group_size, sym, desc_act; checkpoint_format gptq (v1, also where it is not there) or
                          gptq_v2, see _zero_points.py
    dynamic               regular expression -> bits, group_size, sym of the layers it matches from the start of the
                          path; ``-:`` in front: those stay float.  The first that matches decides, as in GPTQModel
    layout                _gptq_layout.py

The convention of zero points is held against the numbers of every layer.  Refused: other words than of 32 bits, layouts
of one kernel (marlin, bitblas, …), rotations that a runtime would have to apply.
Source: quantization/config.py of GPTQModel 7.6, README of AutoGPTQ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from roundexport.errors import CheckpointError, UnsupportedError

from ._gptq_layout import Scheme, checked_layers, checked_scheme
from .interface import ForeignLinear, Importer, QuantizedFolder

_SHIFTS = {"gptq": 1, "gptq_v2": 0}


def _recognizes(config: Mapping[str, Any]) -> bool:
    return config.get("quant_method") == "gptq"


def _layers(folder: QuantizedFolder) -> Sequence[ForeignLinear]:
    config, where = folder.config, folder.location
    form = config.get("checkpoint_format") or config.get("format") or "gptq"
    if form not in _SHIFTS:
        raise UnsupportedError(
            f"{where}: the GPTQ layout {form!r} is one kernel's own; gptq and gptq_v2 are read. Save it as one of them "
            "with GPTQModel, or start from the float model: roundexport tune"
        )
    if config.get("pack_dtype") not in (None, "int32"):
        raise UnsupportedError(f"{where}: codes packed in {config['pack_dtype']} are not read; int32 is")
    if config.get("rotation"):
        raise UnsupportedError(
            f"{where}: its activations are rotated ({config['rotation']}) while the model runs, which no package does; "
            "start from the float model: roundexport tune"
        )
    if config.get("bits") in (5, 6, 7):
        raise UnsupportedError(f"{where}: GPTQ of {config['bits']} bits is packed in planes, which is not read")
    default = checked_scheme(config.get("bits"), config.get("group_size", -1), config.get("sym", True), _SHIFTS[form],
                             f"{where}: quantization_config")  # fmt: skip
    dynamic = _dynamic(config, where)
    return checked_layers(
        folder,
        {module: _scheme_of(module, default, dynamic, where) for module in folder.tensors.modules_with("qweight")},
        explicit=bool(config.get("checkpoint_format") or config.get("format")),
    )


def _dynamic(config: Mapping[str, Any], where: str) -> list[tuple[bool, re.Pattern[str], Mapping[str, Any]]]:
    """Whether its layers are quantized, what they are called, and their own scheme."""
    entries = config.get("dynamic") or {}
    if not isinstance(entries, Mapping):
        raise CheckpointError(f"{where}: dynamic must map patterns to settings, not be {entries!r:.80}")
    found = []
    for pattern, settings in entries.items():
        try:
            compiled = re.compile(pattern.removeprefix("-:").removeprefix("+:"))
        except re.error as error:
            raise CheckpointError(f"{where}: dynamic: {pattern!r} is not a regular expression: {error}") from error
        if not isinstance(settings or {}, Mapping):
            raise CheckpointError(f"{where}: dynamic: the settings of {pattern!r} must be an object")
        found.append((not pattern.startswith("-:"), compiled, settings or {}))
    return found


def _scheme_of(
    module: str, default: Scheme, dynamic: Sequence[tuple[bool, re.Pattern[str], Mapping[str, Any]]], where: str
) -> Scheme:
    for quantized, pattern, own in dynamic:
        if not pattern.match(module):
            continue
        if not quantized:
            raise CheckpointError(f"{where}: dynamic leaves {module} float, but the weights hold codes for it")
        return checked_scheme(
            own.get("bits", default.bits), own.get("group_size", default.group_size), own.get("sym", default.symmetric),
            default.zero_shift, f"{where}: dynamic: {pattern.pattern}",
        )  # fmt: skip
    return default


IMPORTER = Importer("GPTQ", _recognizes, _layers)
