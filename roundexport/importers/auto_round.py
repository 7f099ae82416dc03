"""auto-round: what its own format holds, of 2 to 8 bits, with a scheme per layer where the file says so.

    quant_method auto-round     bits, group_size, sym, data_type int; older files: intel/auto-round, `backend`
    packing_format              auto_round, auto_round:gptqmodel    GPTQ's layout, zero points as they are
                                auto_round:auto_gptq                GPTQ's layout, one too low (v1)
                                auto_round:auto_awq                 AWQ's gemm layout
    extra_config                layer, or regular expression -> bits, group_size, sym of its own; 16 bits: float

Refused: floats (MXFP4, NVFP4, FP8), quantized activations, rotations that run with the model, `fake` (floats on a
grid), llm_compressor packings of floats.
Source: export_to_autoround and inference/convert_model.py of auto-round 0.16.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from roundexport.errors import CheckpointError, UnsupportedError

from ._awq_layout import gemm_layer
from ._gptq_layout import Scheme, checked_layers, checked_scheme
from .interface import ForeignLinear, Importer, QuantizedFolder

_METHODS = ("auto-round", "intel/auto-round", "auto_round")
_FLOAT_BITS = 16
_SHIFTS = {"auto_round": 0, "auto_round:gptqmodel": 0, "auto_round:auto_gptq": 1}
_AWQ = "auto_round:auto_awq"


def _recognizes(config: Mapping[str, Any]) -> bool:
    return config.get("quant_method") in _METHODS


def _layers(folder: QuantizedFolder) -> Sequence[ForeignLinear]:
    config, where = folder.config, folder.location
    packing = _packing(config, where)
    for key, meaning in (("act_bits", "quantizes activations"), ("rotation_config", "rotates activations")):
        value = config.get(key)
        if value and not (isinstance(value, int) and value >= _FLOAT_BITS):
            raise UnsupportedError(
                f"{where}: it {meaning} while the model runs ({key} {value!r:.60}), which is not carried over; start "
                "from the float model: roundexport tune"
            )
    schemes = {module: _scheme_of(module, config, packing, where) for module in folder.tensors.modules_with("qweight")}
    if packing == _AWQ:
        if not schemes:
            raise CheckpointError(f"{where}: quantization_config says quantized, but no layer has a qweight")
        return [gemm_layer(folder, module, scheme) for module, scheme in schemes.items()]
    return checked_layers(folder, schemes, explicit="packing_format" in config)


def _packing(config: Mapping[str, Any], where: str) -> str:
    packing = str(config.get("packing_format") or config.get("backend") or "auto_round")
    if config.get("packing_format") is None and packing not in (*_SHIFTS, _AWQ):  # older files name a kernel
        packing = _AWQ if "awq" in packing else "auto_round:auto_gptq" if ":gptq" in packing else "auto_round"
    if packing not in (*_SHIFTS, _AWQ) or config.get("data_type", "int") != "int":
        raise UnsupportedError(
            f"{where}: the auto-round packing {packing!r} of {config.get('data_type', 'int')!r} is not read; integers "
            f"in {', '.join((*_SHIFTS, _AWQ))} are. Save it as one of them, or start from the float model: roundexport "
            "tune"
        )
    return packing


def _scheme_of(module: str, config: Mapping[str, Any], packing: str, where: str) -> Scheme:
    own = _own(module, config.get("extra_config"), where)
    values = {key: own.get(key, config.get(key)) for key in ("bits", "group_size", "sym")}
    if values["bits"] == _FLOAT_BITS:
        raise CheckpointError(f"{where}: extra_config leaves {module} float, but the weights hold codes for it")
    shift = _SHIFTS.get(packing, 0)
    return checked_scheme(values["bits"], values["group_size"], values["sym"], shift, f"{where}: {module}")


def _own(module: str, extra: object, where: str) -> Mapping[str, Any]:
    """What extra_config says of a layer: under its name, or by the first pattern that is found in it."""
    if not extra:
        return {}
    if not isinstance(extra, Mapping) or not all(isinstance(value, Mapping) for value in extra.values()):
        raise CheckpointError(f"{where}: extra_config must map layers to settings, not be {extra!r:.80}")
    if module in extra:
        return dict(extra[module])
    for pattern, settings in extra.items():
        try:
            if re.search(pattern, module) and not _names_another(pattern, module):
                return dict(settings)
        except re.error as error:
            raise CheckpointError(f"{where}: extra_config: {pattern!r} is not a pattern: {error}") from error
    return {}


def _names_another(name: str, module: str) -> bool:
    """Whether a key without any sign of a pattern is the path of another layer, of which this one's is an extension."""
    return re.fullmatch(r"[\w.]+", name) is not None and name != module


IMPORTER = Importer("auto-round", _recognizes, _layers)
