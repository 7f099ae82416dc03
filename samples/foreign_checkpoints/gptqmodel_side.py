"""Checkpoints that GPTQModel writes of a model, in its own environment.

gptqmodel_side.py MODEL TEXT OUT [NAME…]
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it starts one and then asks for two

from cases import make, source
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoTokenizer

CASES: dict[str, dict[str, Any]] = {
    "gptq-by-gptqmodel-w4g32-sym": {"bits": 4, "group_size": 32, "sym": True, "desc_act": False},
    "gptq-by-gptqmodel-w4g64-asym": {"bits": 4, "group_size": 64, "sym": False, "desc_act": False},
    "gptq-by-gptqmodel-v2-w4g32-asym": {"bits": 4, "group_size": 32, "sym": False, "desc_act": False,
                                        "format": "gptq_v2"},
    "gptq-by-gptqmodel-w8row-sym": {"bits": 8, "group_size": -1, "sym": True, "desc_act": False,
                                    "act_group_aware": False},
    "gptq-by-gptqmodel-w3g32-sym": {"bits": 3, "group_size": 32, "sym": True, "desc_act": False},
    "gptq-by-gptqmodel-w2g32-asym": {"bits": 2, "group_size": 32, "sym": False, "desc_act": False},
    "gptq-by-gptqmodel-act-order": {"bits": 4, "group_size": 32, "sym": True, "desc_act": True,
                                    "act_group_aware": False},
    "gptq-by-gptqmodel-lm_head": {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": True},
    "gptq-by-gptqmodel-mixed": {"bits": 4, "group_size": 32, "sym": True, "desc_act": False,
                                "dynamic": {r"+:.*\.down_proj$": {"bits": 8, "group_size": 64}}},
}  # fmt: skip


def main(model: str, text: Path, out: Path, names: list[str]) -> int:
    """Make every case that is asked for, all by default; returns how many failed."""
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(encoding="utf-8")[:20_000])["input_ids"]
    samples = [{"input_ids": ids[at : at + 64], "attention_mask": [1] * 64} for at in range(0, 64 * 16, 64)]

    def one(name: str, settings: dict[str, Any], folder: Path) -> None:
        with source(model, "lm_head" in settings) as given:
            tuned = GPTQModel.load(given, QuantizeConfig(device="cpu", **settings))
            tuned.quantize(samples, batch_size=4)
            tuned.save(str(folder))

    return make(CASES, one, model, out, names, "group_size")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]) > 0)
