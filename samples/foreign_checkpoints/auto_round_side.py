"""Checkpoints that auto-round writes of a model, in its own environment.

    auto_round_side.py MODEL TEXT OUT [NAME…]

Rounding to nearest (iters=0), but for those named tuned, which take two steps on eight samples of TEXT: what is proved
is that integers arrive, not how good they are.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from cases import make, source
from transformers import PreTrainedTokenizerFast

MIXED = {"model.layers.0.mlp.down_proj": {"bits": 8}, "model.layers.1.self_attn.o_proj": {"bits": 16}}
CASES: dict[str, dict[str, Any]] = {
    "auto_round-w4g32-sym": {"format": "auto_round", "bits": 4, "group_size": 32, "sym": True},
    "auto_round-w4g32-asym": {"format": "auto_round", "bits": 4, "group_size": 32, "sym": False},
    "auto_round-w2g64-asym": {"format": "auto_round", "bits": 2, "group_size": 64, "sym": False},
    "auto_round-w3row-asym": {"format": "auto_round", "bits": 3, "group_size": -1, "sym": False},
    "auto_round-w8g64-sym": {"format": "auto_round", "bits": 8, "group_size": 64, "sym": True},
    "auto_round-w8g128-sym": {"format": "auto_round", "bits": 8, "group_size": 128, "sym": True},
    "auto_round-mixed": {"format": "auto_round", "bits": 4, "group_size": 32, "sym": False, "layer_config": MIXED},
    "auto_round-lm_head-w4g32-sym": {"format": "auto_round", "bits": 4, "group_size": 32, "sym": True,
                                     "quant_lm_head": True},
    "auto_round-gptq-w4g32-sym": {"format": "auto_round:auto_gptq", "bits": 4, "group_size": 32, "sym": True},
    "auto_round-awq-w4g32-asym": {"format": "auto_round:auto_awq", "bits": 4, "group_size": 32, "sym": False},
    "auto_round-gptqmodel-w4g32-asym": {"format": "auto_round:gptqmodel", "bits": 4, "group_size": 32, "sym": False},
    "auto_round-tuned-w4g32-asym": {"format": "auto_round", "bits": 4, "group_size": 32, "sym": False, "iters": 2},
    "gptq-by-auto_round-tuned-w4g64-sym": {"format": "auto_gptq", "bits": 4, "group_size": 64, "sym": True, "iters": 2},
    "gptq-by-auto_round-w4g32-sym": {"format": "auto_gptq", "bits": 4, "group_size": 32, "sym": True},
    "gptq-by-auto_round-w4g32-asym": {"format": "auto_gptq", "bits": 4, "group_size": 32, "sym": False},
    "awq-by-auto_round-w4g32-asym": {"format": "auto_awq", "bits": 4, "group_size": 32, "sym": False},
    "ct-by-auto_round-w4g32-sym": {"format": "llm_compressor", "bits": 4, "group_size": 32, "sym": True},
    "ct-by-auto_round-w4g32-asym": {"format": "llm_compressor", "bits": 4, "group_size": 32, "sym": False},
}  # fmt: skip


def main(model: str, text: Path, out: Path, names: list[str]) -> int:
    """Make every case that is asked for, all by default; returns how many failed."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(model) / "tokenizer.json"))
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8")[:20_000])["input_ids"][:512]).reshape(8, 1, 64)

    def one(name: str, settings: dict[str, Any], folder: Path) -> None:
        usual = {"iters": 0, "nsamples": 8, "seqlen": 64, "disable_opt_rtn": True, "enable_torch_compile": False}
        usual |= {"dataset": list(ids), "batch_size": 4} if "iters" in settings else {}
        scheme = {key: value for key, value in settings.items() if key != "format"}
        made = folder.with_suffix(".made")  # in which it makes a folder of a name that it chooses
        shutil.rmtree(made, ignore_errors=True)
        with source(model, "quant_lm_head" in settings) as given:
            AutoRound(given, **{**usual, **scheme}).quantize_and_save(str(made), format=settings["format"])
        shutil.move(next(path.parent for path in made.rglob("config.json")), folder)
        shutil.rmtree(made, ignore_errors=True)

    return make(CASES, one, model, out, names, "group_size")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]) > 0)
