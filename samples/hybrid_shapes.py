"""What decoders with states of a fixed size cost: shapes of LFM2-350M and Qwen3.5-0.8B, on both runtimes, in turn.

    python samples/hybrid_shapes.py [--work DIR] [--blocks 6|all] [--rounds 9] [--threads 2] [--prepare]

    lfm2-350m       width 1024, feed-forward 4608, 16 heads of 64 and 8 of keys; ten short convolutions, six attentions
    qwen3.5-0.8b    width 1024, feed-forward 3584, 8 heads of 256 and 2 of keys; three gated delta rules to an attention
    llama           as wide, attention alone: what a decoder without states takes at as many blocks

Random weights, on which speed does not depend, 4 bits in groups of 32, a vocabulary of 4096 instead of 65,536 and
248,320: the head is the same product in all of them and would hide what is asked.  Fewer blocks than the models have
(--blocks) keep the order of kinds; time per block is what the last column tells.  ``--prepare`` only makes packages.
Prompts of 128 and 512 tokens, 64 written.  Needs `pip install roundexport[all]`, 2 GiB of disk.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import roundexport
from roundexport.runtime.benchmarking.bench import bench

TARGETS = ("onnx", "openvino")
PROMPTS, OUTPUT = (128, 512), 64
COMMON = {
    "vocab_size": 4096, "hidden_size": 1024, "max_position_embeddings": 4096,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
LFM2_KINDS = ["full_attention" if block in (2, 5, 8, 10, 12, 14) else "conv" for block in range(16)]
QWEN_KINDS = ["full_attention" if block % 4 == 3 else "linear_attention" for block in range(24)]


@dataclass(frozen=True)
class Shape:
    """A model: its classes in transformers, the kinds of its blocks in order, and the rest of its config."""

    config: str
    model: str
    kinds: tuple[str, ...]
    values: dict[str, Any]


SHAPES = {
    "llama": Shape("LlamaConfig", "LlamaForCausalLM", ("full_attention",) * 16, {
        "intermediate_size": 4608, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64,
    }),
    "lfm2-350m": Shape("Lfm2Config", "Lfm2ForCausalLM", tuple(LFM2_KINDS), {
        "intermediate_size": 4608, "block_auto_adjust_ff_dim": False, "num_attention_heads": 16,
        "num_key_value_heads": 8, "conv_L_cache": 3,
    }),
    "qwen3.5-0.8b": Shape("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", tuple(QWEN_KINDS), {
        "intermediate_size": 3584, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256,
        "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "tie_word_embeddings": True,
    }),
}  # fmt: skip


def prepare(work: Path, blocks: int | None) -> dict[str, Path]:
    """Name -> package folder; those that are there are taken as they are."""
    work.mkdir(parents=True, exist_ok=True)
    packages = {}
    for name, shape in SHAPES.items():
        kinds = list(shape.kinds[:blocks])
        stem = f"{name}-{len(kinds)}"
        checkpoint, artifact = work / stem, work / f"{stem}-artifact"
        if not artifact.exists():
            torch.manual_seed(0)
            kept = {} if name == "llama" else {"layer_types": kinds}
            config = getattr(transformers, shape.config)(**COMMON, **shape.values, **kept, num_hidden_layers=len(kinds))
            getattr(transformers, shape.model)(config).save_pretrained(checkpoint)
            settings = roundexport.TuneSettings(recipe="rtn", group_size=32)
            roundexport.tune(checkpoint, artifact, settings, progress=False)
        for target in TARGETS:
            packages[f"{name} {target}"] = out = work / f"{stem}-{target}"
            if not out.exists():
                report = roundexport.export(artifact, out, to=target, progress=False)
                print(f"{name} {target}, {len(kinds)} blocks: {report.fusions}", flush=True)
    return packages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--blocks", default="all", help="a number, or all that a model has")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prepare", action="store_true", help="only make the packages")
    given = parser.parse_args()
    blocks = None if given.blocks == "all" else int(given.blocks)
    with tempfile.TemporaryDirectory() as scratch:
        packages = prepare(given.work or Path(scratch), blocks)
        if given.prepare:
            return
        report = bench(
            list(packages.values()), prompt_lens=PROMPTS, output_len=OUTPUT, rounds=given.rounds,
            threads=given.threads, cold=False,
        )  # fmt: skip
    print(json.dumps(report.machine))
    print("| shape | runtime | blocks | prompt | TTFT ms | TPOT ms | a block, TTFT | a block, TPOT |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for name, opened in zip(packages, report.contestants, strict=True):
        shape, target = name.split()
        count = len(SHAPES[shape].kinds[:blocks])
        for length in PROMPTS:
            runs = [run for run in report.runs if run.contestant == opened.name and run.shape["prompt_len"] == length]
            first, step = (float(np.median([run.metrics[key] for run in runs])) for key in ("ttft_ms", "tpot_ms"))
            figures = f"{first:.1f} | {step:.2f} | {first / count:.2f} | {step / count:.3f}"
            print(f"| {shape} | {target} | {count} | {length} | {figures} |")


if __name__ == "__main__":
    main()
