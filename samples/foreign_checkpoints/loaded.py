"""Folders that roundexport wrote, loaded by transformers with the owner's package, in the owner's environment.

    loaded.py FOLDER…

Prints per folder the largest difference between its logits and those in `expected.npz` (going_out.py), as a share of
the largest logit: as it loads, and with the layers' scales turned to float32 before they are multiplied, as some
packages round the matrices to float16 on the way.  The exit code is 1 where the second is above 1e-5, or a folder does
not load.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

LIMIT = 1e-5


def difference(model: torch.nn.Module, expected: Mapping[str, Any]) -> float:
    """Of the logits, as a share of the largest."""
    with torch.no_grad():
        logits = model(torch.from_numpy(expected["ids"])).logits.float().numpy()
    return float(np.abs(logits - expected["logits"]).max() / np.abs(expected["logits"]).max())


def main(folders: list[str]) -> int:
    """Print a row per folder."""
    held = True
    for folder in map(Path, folders):
        expected = np.load(folder / "expected.npz")
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()
            errors = [difference(model, expected), difference(torch.nn.Module.float(model), expected)]
        except Exception as error:
            held = False
            print(f"{folder.name:34} | FAILED {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        held &= errors[1] <= LIMIT
        layers = {type(module).__name__ for name, module in model.named_modules() if name.endswith("q_proj")}
        print(
            f"{folder.name:34} | {errors[0]:.1e} as it loads, {errors[1]:.1e} in float32 | {', '.join(sorted(layers))}",
            flush=True,
        )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
