"""GPTQ: folders for GPTQModel, transformers and vLLM, of 2, 3, 4 and 8 bits.

    checkpoint_format    gptq (v1) where every layer is symmetric: the form that all loaders read right; else gptq_v2,
                         as v1 cannot say a zero point of 0, and loaders refuse or misread v1 of asymmetric weights
    dynamic              the scheme of layers that have another than most, and ``-:`` those of a block that stay float
    desc_act             false: groups are runs of inputs

Of mixed bits, and of a quantized lm_head, transformers' own loader (through optimum) knows nothing; GPTQModel reads
both.  vLLM takes symmetric weights of 4 and 8 bits; it multiplies query, key and value as one, and gate and up, and
looks for their scheme under the name of the whole, so `dynamic` has patterns for those, too.
Source: quantization/config.py of GPTQModel 7.6, gptq/quantizer.py of optimum 2.3, quantization/auto_gptq.py and
utils/gptq_utils.py of vLLM 0.33; layout in _gptq_layout.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ._folder import FolderFormat, Model, Packing, uniform
from ._gptq_layout import g_idx, pack, refusal, tensors
from ._outgoing import HEAD, Facts

_BLOCK = re.compile(r"\.\d+\.")
_WHOLES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_VLLM = ((4, True), (8, True))  # bits, symmetric


def _packing(model: Model) -> Packing:
    layers = model.layers
    symmetric = all(facts.spec.symmetric for facts in layers)
    bits, group = uniform([(facts.spec.bits, facts.group) for facts in layers])
    config: dict[str, Any] = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": False,
        "static_groups": False, "true_sequential": True, "damp_percent": 0.01,
        "lm_head": any(facts.name == HEAD for facts in layers),
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
    }  # fmt: skip
    notes = []
    floats = [name for name in model.float_modules if _BLOCK.search(name)]
    dynamic, torn = _dynamic(layers, bits, group, symmetric, floats)
    if dynamic:
        config["dynamic"] = dynamic
    if floats and (quantized := _places(layers, floats)):
        config["modules_in_block_to_quantize"] = [quantized]
    mixed = any((facts.spec.bits, facts.group) != (bits, group) for facts in layers)
    if mixed or config["lm_head"] or (floats and "modules_in_block_to_quantize" not in config):
        notes.append(
            "layers differ in their schemes, or lm_head is quantized: GPTQModel loads that, transformers' own loader "
            "does not"
        )
    if not symmetric:
        notes.append("zero points are stored as gptq_v2, which GPTQModel reads; older loaders know v1 alone")
    if any((facts.spec.bits, facts.spec.symmetric) not in _VLLM for facts in layers):
        notes.append(
            "vLLM reads GPTQ of 4 and 8 bits, symmetric; this is not: --to compressed-tensors is what it loads"
        )
    elif torn:
        notes.append(f"vLLM multiplies {torn[0]} as one and takes one scheme for all of it; here its parts differ")
    return Packing(
        config,
        lambda facts: {**tensors(facts), "g_idx": ("I32", (facts.width,))},
        lambda facts, linear: {**pack(facts, linear, 1 if symmetric else 0), "g_idx": g_idx(facts)},
        tuple(notes),
    )


def _dynamic(
    layers: Sequence[Facts], bits: int, group: int, symmetric: bool, floats: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Patterns of the layers that are not as most, and the wholes of vLLM whose parts differ."""
    usual = {"bits": bits, "group_size": group, "sym": symmetric}
    found: dict[str, dict[str, Any]] = {f"-:^{re.escape(name)}$": {} for name in floats}
    own = {
        facts.name: {"bits": facts.spec.bits, "group_size": facts.group, "sym": facts.spec.symmetric}
        for facts in layers
    }
    found |= {f"+:^{re.escape(name)}$": scheme for name, scheme in own.items() if scheme != usual}
    torn = []
    for whole, parts in _WHOLES.items():
        for parent in dict.fromkeys(name.rpartition(".")[0] for name in own if name.endswith(f".{parts[0]}")):
            schemes = [own.get(f"{parent}.{part}") for part in parts]
            if any(scheme != schemes[0] for scheme in schemes):
                torn.append(f"{parent}.{whole}")
            elif schemes[0] is not None and schemes[0] != usual:
                found[f"+:^{re.escape(f'{parent}.{whole}')}$"] = schemes[0]
    return found, torn


def _places(layers: Sequence[Facts], floats: Sequence[str]) -> list[str]:
    """Names inside a block of what is quantized in every block; none where a block differs from another."""
    quantized = dict.fromkeys(_BLOCK.split(facts.name, maxsplit=1)[-1] for facts in layers if _BLOCK.search(facts.name))
    left = {_BLOCK.split(name, maxsplit=1)[-1] for name in floats}
    return [] if left & quantized.keys() else list(quantized)


EXPORTER = FolderFormat("GPTQ", refusal, _packing).exporter()
