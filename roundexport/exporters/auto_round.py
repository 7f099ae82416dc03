"""auto-round: its own format, of 2, 3, 4 and 8 bits, with a scheme per layer where they differ.

    packing_format    auto_round:auto_gptq where every layer is symmetric, else auto_round (zero points as they are), as
                      auto-round itself chooses
    extra_config      the scheme of layers that have another than most; 16 bits: those of a block that stay float

transformers loads it through the auto-round package; vLLM reads auto_round:auto_gptq.
Source: export_to_autoround and inference/convert_model.py of auto-round 0.16.1; layout in _gptq_layout.py.
"""

from __future__ import annotations

import re
from typing import Any

from ._folder import FolderFormat, Model, Packing, uniform
from ._gptq_layout import pack, refusal, tensors
from ._outgoing import Facts

_BLOCKS = re.compile(r"(.*?)\.\d+\.")


def _packing(model: Model) -> Packing:
    symmetric = all(facts.spec.symmetric for facts in model.layers)
    usual = uniform([_scheme(facts) for facts in model.layers])
    blocks = dict.fromkeys(found.group(1) for facts in model.layers if (found := _BLOCKS.match(facts.name)))
    inside = tuple(f"{name}." for name in blocks)
    extra: dict[str, dict[str, Any]] = {
        facts.name: dict(_scheme(facts))
        for facts in model.layers
        if _scheme(facts) != usual or not facts.name.startswith(inside)
    }
    extra |= {name: {"bits": 16, "data_type": "float"} for name in model.float_modules if name.startswith(inside)}
    config: dict[str, Any] = {
        "quant_method": "auto-round", **dict(usual), "data_type": "int", "autoround_version": "0.16.1",
        "packing_format": "auto_round:auto_gptq" if symmetric else "auto_round",
        "block_name_to_quantize": ",".join(blocks),
    }  # fmt: skip
    notes = () if symmetric else ("asymmetric weights are packed as auto_round, which vLLM does not read",)
    if extra:
        config["extra_config"] = extra
    return Packing(config, tensors, lambda facts, linear: pack(facts, linear, 1 if symmetric else 0), notes)


def _scheme(facts: Facts) -> tuple[tuple[str, Any], ...]:
    return ("bits", facts.spec.bits), ("group_size", facts.group), ("sym", facts.spec.symmetric)


EXPORTER = FolderFormat("auto-round", refusal, _packing).exporter()
