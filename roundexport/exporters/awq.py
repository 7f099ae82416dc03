"""AWQ: folders of 4 bits in AutoAWQ's gemm layout, for transformers, vLLM and AutoAWQ.

    qweight [K, N/8] I32, qzeros [G, N/8] I32    along N, in runs of eight out of order (quant/word_packing.py)
    scales  [G, N] F16

Every layer of a block has the same group size; those that stay float are in modules_to_not_convert.  lm_head is never
quantized there.  What AWQ would have scaled is in the float weights already, where tuning folded it; families behind
whose GELU loaders look for scales of it (``act.scales``) are refused.
Source: WQLinear_GEMM of AutoAWQ 0.2.9, integrations/awq.py of transformers 5.24.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import UnsupportedError
from roundexport.quant.packing import pack_codes
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.word_packing import awq_places, words_of_stream
from roundexport.storage.safetensors_reader import TensorSpec

from ._folder import FolderFormat, Model, Packing
from ._outgoing import HEAD, Facts, stored

_BITS = 4
_PER_WORD = 8
_SCALED = frozenset("starcoder2 RefinedWebModel falcon mpt gptj gpt_neox gpt_bigcode bloom".split())


def _refusal(facts: Facts) -> str | None:
    if facts.name == HEAD:
        return "loaders of AWQ take lm_head for float"
    if facts.spec.bits != _BITS:
        return f"it has {facts.spec.bits} bits, AWQ has {_BITS}; auto_round, gptq and compressed-tensors hold others"
    if facts.scales != "F16":
        return "its scales need bfloat16, AWQ's are float16; auto_round, gptq and compressed-tensors hold them"
    if facts.rows % _PER_WORD:
        return f"its {facts.rows} outputs are not a multiple of {_PER_WORD}; keep the layer float and tune again"
    return None


def _packing(model: Model) -> Packing:
    if model.kind in _SCALED:
        raise UnsupportedError(
            f"loaders of AWQ look for scales behind the activation of {model.kind} models, which an artifact does not "
            "have; export to gptq, auto_round or compressed-tensors"
        )
    groups = {facts.group: facts.name for facts in model.layers}
    if len(groups) > 1:
        said = ", ".join(f"{size} ({name})" for size, name in groups.items())
        raise UnsupportedError(
            f"AWQ has one group size for all layers, these have {said}; auto_round, gptq and compressed-tensors hold "
            "several, or tune with --group-size of one that divides every layer's inputs"
        )
    config = {
        "quant_method": "awq", "bits": _BITS, "group_size": next(iter(groups)), "zero_point": True, "version": "gemm",
        "modules_to_not_convert": list(dict.fromkeys((*model.float_modules, HEAD))),
    }  # fmt: skip
    return Packing(config, _tensors, _pack)


def _tensors(facts: Facts) -> dict[str, TensorSpec]:
    groups, words = facts.spec.groups(facts.width), facts.rows // _PER_WORD
    return {
        "qweight": ("I32", (facts.width, words)), "qzeros": ("I32", (groups, words)),
        "scales": ("F16", (groups, facts.rows)),
    }  # fmt: skip


def _pack(facts: Facts, linear: QuantizedLinear) -> dict[str, NDArray[np.generic]]:
    codes, zeros = (
        words_of_stream(pack_codes(awq_places(np.ascontiguousarray(part.T)), _BITS))
        for part in (linear.unpack(), linear.full_zero_points())
    )
    return {"qweight": codes, "qzeros": zeros, "scales": stored(linear.scales.T, "F16")}


EXPORTER = FolderFormat("AWQ", _refusal, _packing).exporter()
