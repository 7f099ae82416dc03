"""Whole files of llama.cpp's types, as its users have them: llama_files.py MODEL.gguf OUT TYPE… [--python PATH].

    python samples/compare_tuners/llama_files.py real-model-out/SmolLM2-135M-Instruct.Q4_1.gguf out Q4_K_M Q4_0 \
        --python .llama/bin/python

MODEL.gguf is of any type and holds the tokenizer; its values, in float32, are what is quantized.  The importance matrix
is of the tokens that compare.py takes, and embeddings and lm_head get what llama.cpp gives them.  For every TYPE there
is OUT/TYPE.gguf; printed is what its tensors take: the linears of the blocks, the tables, and the file.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np

SAMPLES = Path(__file__).resolve().parent.parent
BLOCKS = "blk."


def side(model: str, source: Path, out: Path, types: list[str]) -> None:
    """In llama.cpp's environment: the matrix of OUT/ids.npy, once, and the files that are not there yet."""
    import torch
    from llama_side import block_linears, importance, quantize, tensor_names
    from transformers import AutoModelForCausalLM

    kept = out / "importance.npz"
    if not kept.exists():
        floats = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        names = tensor_names(floats.config.num_hidden_layers)
        found = importance(floats, torch.from_numpy(np.load(out / "ids.npy")))
        assert found.keys() == block_linears(floats).keys()
        np.savez(kept, **{f"{names.get_name(name)}.weight": row for name, row in found.items()})
    matrix = dict(np.load(kept))
    for kind in types:
        made = out / f"{kind}.gguf"
        if not made.exists():
            quantize(source, made.with_suffix(".part"), kind, matrix, tables_float=False)
            made.with_suffix(".part").replace(made)


def row(path: Path) -> tuple[str, ...]:
    """What a file's tensors take, as text."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    linears = [tensor for tensor in tensors if tensor.name.startswith(BLOCKS) and len(tensor.shape) > 1]
    tables = [tensor for tensor in tensors if not tensor.name.startswith(BLOCKS) and len(tensor.shape) > 1]
    counts = Counter(tensor.tensor_type.name for tensor in linears)
    return (
        path.name,
        ", ".join(f"{kind} {count}" for kind, count in counts.most_common()),
        f"{bits(linears):.3f}",
        ", ".join(f"{tensor.name} {tensor.tensor_type.name}" for tensor in tables),
        f"{bits(tables):.3f}",
        f"{sum(int(tensor.n_bytes) for tensor in tensors) / 1e6:.1f}",
        f"{path.stat().st_size / 1e6:.1f}",
    )


def bits(tensors: list) -> float:
    """Stored bits per weight."""
    return 8 * sum(int(tensor.n_bytes) for tensor in tensors) / sum(int(tensor.n_elements) for tensor in tensors)


def main() -> None:
    from roundexport.calibration.samples import load_calibration
    from roundexport.model.checkpoint import Checkpoint

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("types", nargs="+")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--calibration", default=str(SAMPLES / "text" / "calibration.txt"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open(given.model)
    np.save(given.out / "ids.npy", load_calibration(checkpoint, given.calibration).ids)
    asked = json.dumps([str(checkpoint.folder), str(given.model), str(given.out), given.types])
    subprocess.run([given.python, __file__, "--side", asked], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    print("| file | tensors of the blocks | bits/weight | tables | bits/weight | tensors, MB | file, MB |")
    print("|---|---|--:|---|--:|--:|--:|")
    for kind in given.types:
        print(f"| {' | '.join(row(given.out / f'{kind}.gguf'))} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        folder, file, where, wanted = json.loads(sys.argv[2])
        side(folder, Path(file), Path(where), wanted)
    else:
        main()
