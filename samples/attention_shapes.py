"""What other rotary embeddings cost: decoders of one size, shaped as Llama, Phi, GLM and Cohere, timed in turn.

    python samples/attention_shapes.py [--work DIR] [--rounds 15] [--threads 2] [--prepare]

    llama     whole heads, pairs in halves                          RMS norms, gated feed-forward
    phi       half of each head, pairs in halves                    layer norms, biases, both branches side by side
    glm       half of each head, pairs side by side                 RMS norms, gate and up in one linear
    cohere    whole heads, pairs side by side                       layer norms, both branches side by side

All have 8 layers, width 1024, 16 heads of 64 and 8 of keys, and feed-forward layers of as many weights; the weights are
random, on which speed does not depend, in 4 bits of groups of 32.  Packages for both runtimes take part in one run, so
that they meet the same drift of the machine; each is held against the Llama shape of its runtime inside each round.
``--prepare`` only makes them (in DIR, where they are found again), as that needs no calm machine.
Needs `pip install roundexport[all]`, 1 GiB of disk.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

import roundexport
from roundexport.runtime.benchmarking.bench import bench

TARGETS = ("onnx", "openvino")
PROMPT, OUTPUT = 128, 64
COMMON = {
    "vocab_size": 4096, "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GATED, PLAIN = {"intermediate_size": 2816}, {"intermediate_size": 4224}  # 3 and 2 matrices
HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
SHAPES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GATED),
    "phi": ("PhiConfig", "PhiForCausalLM", {**PLAIN, **HALF}),
    "glm": ("GlmConfig", "GlmForCausalLM", {**GATED, **HALF, "attention_bias": True}),
    "cohere": ("CohereConfig", "CohereForCausalLM", GATED),
}


def prepare(work: Path) -> dict[str, Path]:
    """Name -> package folder; those that are there are taken as they are."""
    packages = {f"{shape} {target}": work / f"{shape}-{target}" for shape in SHAPES for target in TARGETS}
    for shape, (config, model, values) in SHAPES.items():
        checkpoint, artifact = work / shape, work / f"{shape}-artifact"
        if not artifact.exists():
            torch.manual_seed(0)
            made = getattr(transformers, model)(getattr(transformers, config)(**COMMON, **values))
            made.save_pretrained(checkpoint)
            settings = roundexport.TuneSettings(recipe="rtn", group_size=32)
            roundexport.tune(checkpoint, artifact, settings, progress=False)
        for target in TARGETS:
            if not (out := packages[f"{shape} {target}"]).exists():
                report = roundexport.export(artifact, out, to=target, progress=False)
                print(f"{shape} {target}: {report.fusions}", flush=True)
    return packages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prepare", action="store_true", help="only make the packages")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        packages = prepare(given.work or Path(scratch))
        if given.prepare:
            return
        report = bench(
            list(packages.values()), prompt_lens=(PROMPT,), output_len=OUTPUT, rounds=given.rounds,
            threads=given.threads, cold=False,
        )  # fmt: skip
    print(json.dumps(report.machine))
    print(f"{'':18}  ms/token   to llama: median, quartiles over rounds   prefill ms")
    names = {opened.name: name for name, opened in zip(packages, report.contestants, strict=True)}
    times: dict[str, list[float]] = {name: [] for name in packages}
    first: dict[str, list[float]] = {name: [] for name in packages}
    for run in report.runs:
        times[names[run.contestant]].append(run.metrics["tpot_ms"])
        first[names[run.contestant]].append(run.metrics["ttft_ms"])
    for name, own in times.items():
        base = times[f"llama {name.split()[1]}"]
        ratios = np.array(own) / np.array(base)
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        print(f"{name:18} {np.median(own):9.3f} {middle:11.3f}   {low:.3f} … {high:.3f} {np.median(first[name]):20.1f}")


if __name__ == "__main__":
    main()
