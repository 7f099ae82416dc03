"""Artifacts of a model exported to the formats of others, and the logits that the folders must give.

    going_out.py MODEL OUT [SCHEME…]

Rounds MODEL to nearest in schemes (default: all) whose groups divide its inputs, and writes OUT/<format>-<scheme> with
`expected.npz` in each: token ids and the logits of the float32 model with the artifact's dequantized weights.
loaded.py compares, where an owner lives.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import divides

from roundexport import TuneSettings, export, tune
from roundexport.formats.artifact import Artifact
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.dequantized_model import DequantizedModel

SCHEMES: dict[str, dict[str, Any]] = {
    "w4g32-sym": {"bits": 4, "group_size": 32},
    "w4g64-asym": {"bits": 4, "group_size": 64, "symmetric": False},
    "w8g128-sym": {"bits": 8, "group_size": 128},
    "w2g32-asym": {"bits": 2, "group_size": 32, "symmetric": False},
    "w3g64-asym": {"bits": 3, "group_size": 64, "symmetric": False},
    "mixed": {"bits": 4, "group_size": 32},
}
RULES = [{"match": "down_proj$", "bits": 8, "group_size": 64}]  # of the mixed one
FORMATS = {
    "w4g32-sym": ("auto_round", "gptq", "awq", "compressed-tensors", "gguf"),
    "w4g64-asym": ("auto_round", "gptq", "awq", "compressed-tensors"),
    "w8g128-sym": ("auto_round", "gptq", "compressed-tensors"),
    "w2g32-asym": ("auto_round", "gptq", "compressed-tensors"),
    "w3g64-asym": ("auto_round", "gptq", "compressed-tensors"),
    "mixed": ("auto_round", "gptq", "compressed-tensors"),
}


def main(model: str, out: Path, schemes: list[str]) -> None:
    """Make what is not there yet."""
    ids = np.random.default_rng(0).integers(8, 400, (2, 32))
    out.mkdir(parents=True, exist_ok=True)
    rules = out / "rules.json"
    rules.write_text(json.dumps(RULES))
    for scheme, settings in SCHEMES.items():
        if (schemes and scheme not in schemes) or not divides(settings["group_size"], model):
            continue
        folder = out / "artifacts" / scheme
        if not folder.exists():
            apart = str(rules) if scheme == "mixed" else None
            tune(model, folder, TuneSettings(algorithm="rtn", rules=apart, **settings), progress=False)
        artifact = Artifact.open(folder)
        found = DequantizedModel(artifact, Checkpoint.open(model))
        logits = found.run({"input_ids": torch.from_numpy(ids)}).numpy()
        for form in FORMATS[scheme]:
            name = f"{form}-{scheme}"
            if not (out / name).exists():
                aside = out / f"{name}.partial"  # a folder of this name is whole
                shutil.rmtree(aside, ignore_errors=True)
                report = export(folder, aside, to=form, progress=False)
                np.savez(aside / "expected.npz", ids=ids, logits=logits)
                aside.rename(out / name)
                print(f"made {name}: {len(report.exported)} layers", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
