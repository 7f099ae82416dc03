"""AWQ: what AutoAWQ, auto-round (`--format auto_awq`) and GPTQModel write, 4 bits in the gemm and gemv layouts.

    quant_method awq      bits or w_bit; group_size or q_group_size; version or format: gemm (the default) or gemv
    layouts               _awq_layout.py

What AWQ scales is folded into the layers before, so nothing of it is left to apply; where it could not be folded, as
behind GELU in some families, the file has scales without codes (`…act.scales`), which no runtime applies: refused.
Refused: layouts of one kernel (gemv_fast, marlin, exllama, llm-awq).
Source: AutoAWQ 0.2.9, quantizer_awq.py of transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from roundexport.errors import CheckpointError, UnsupportedError

from ._awq_layout import gemm_layer, gemv_layer
from ._gptq_layout import checked_scheme
from .interface import ForeignLinear, Importer, QuantizedFolder

_LAYOUTS = {"gemm": gemm_layer, "gemv": gemv_layer}


def _recognizes(config: Mapping[str, Any]) -> bool:
    return config.get("quant_method") == "awq"


def _layers(folder: QuantizedFolder) -> Sequence[ForeignLinear]:
    config, where = folder.config, folder.location
    layout = str(config.get("version") or config.get("format") or "gemm").lower()
    if layout not in _LAYOUTS:
        raise UnsupportedError(
            f"{where}: the AWQ layout {layout!r} is one kernel's own; gemm and gemv are read. Save it as gemm, or "
            "start from the float model: roundexport tune"
        )
    scheme = checked_scheme(
        config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size")), False, 0,
        f"{where}: quantization_config",
    )  # fmt: skip
    modules = folder.tensors.modules_with("qweight")
    if not modules:
        raise CheckpointError(f"{where}: quantization_config says quantized, but no layer has a qweight")
    scaled = [module for module in folder.tensors.modules_with("scales") if module not in set(modules)]
    if scaled:
        raise UnsupportedError(
            f"{where}: {scaled[0]}.scales is for what an activation gives to the next layer while the model runs, "
            "which no package applies; start from the float model: roundexport tune"
        )
    return [_LAYOUTS[layout](folder, module, scheme) for module in modules]


IMPORTER = Importer("AWQ", _recognizes, _layers)
