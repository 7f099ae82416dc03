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
from transformers import PreTrainedTokenizerFast

MIXED = {"model.layers.0.mlp.down_proj": {"bits": 8}, "model.layers.1.self_attn.o_proj": {"bits": 16}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "auto_round-w4g32-sym": ("auto_round", {"bits": 4, "group_size": 32, "sym": True}),
    "auto_round-w4g32-asym": ("auto_round", {"bits": 4, "group_size": 32, "sym": False}),
    "auto_round-w2g64-asym": ("auto_round", {"bits": 2, "group_size": 64, "sym": False}),
    "auto_round-w3row-asym": ("auto_round", {"bits": 3, "group_size": -1, "sym": False}),
    "auto_round-w8g128-sym": ("auto_round", {"bits": 8, "group_size": 128, "sym": True}),
    "auto_round-mixed": ("auto_round", {"bits": 4, "group_size": 32, "sym": False, "layer_config": MIXED}),
    "auto_round-gptq-w4g32-sym": ("auto_round:auto_gptq", {"bits": 4, "group_size": 32, "sym": True}),
    "auto_round-awq-w4g32-asym": ("auto_round:auto_awq", {"bits": 4, "group_size": 32, "sym": False}),
    "auto_round-gptqmodel-w4g32-asym": ("auto_round:gptqmodel", {"bits": 4, "group_size": 32, "sym": False}),
    "auto_round-tuned-w4g32-asym": ("auto_round", {"bits": 4, "group_size": 32, "sym": False, "iters": 2}),
    "gptq-by-auto_round-tuned-w4g64-sym": ("auto_gptq", {"bits": 4, "group_size": 64, "sym": True, "iters": 2}),
    "gptq-by-auto_round-w4g32-sym": ("auto_gptq", {"bits": 4, "group_size": 32, "sym": True}),
    "gptq-by-auto_round-w4g32-asym": ("auto_gptq", {"bits": 4, "group_size": 32, "sym": False}),
    "awq-by-auto_round-w4g32-asym": ("auto_awq", {"bits": 4, "group_size": 32, "sym": False}),
    "ct-by-auto_round-w4g32-sym": ("llm_compressor", {"bits": 4, "group_size": 32, "sym": True}),
    "ct-by-auto_round-w4g32-asym": ("llm_compressor", {"bits": 4, "group_size": 32, "sym": False}),
}  # fmt: skip


def main(model: str, text: Path, out: Path, names: list[str]) -> None:
    """Make every case that is asked for, all by default; one that fails is told and left out."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(model) / "tokenizer.json"))
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8")[:20_000])["input_ids"][:512]).reshape(8, 1, 64)
    for name in names or list(CASES):
        form, scheme = CASES[name]
        if (out / name).is_dir():
            continue
        usual = {"iters": 0, "nsamples": 8, "seqlen": 64, "disable_opt_rtn": True, "enable_torch_compile": False}
        usual |= {"dataset": list(ids), "batch_size": 4} if "iters" in scheme else {}
        try:
            tuner = AutoRound(model, **{**usual, **scheme})
            tuner.quantize_and_save(str(out / f"{name}.partial"), format=form)
            made = out / f"{name}.partial"
            inner = [path.parent for path in made.rglob("config.json")]
            shutil.move(inner[0], out / name)
            shutil.rmtree(made, ignore_errors=True)
            print(f"made {name}", flush=True)
        except Exception as error:
            print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
