"""What every tuner's side shares: its arguments and the form of its answer.

    python X_side.py MODEL IDS.npy OUT SETTINGS_JSON

A side runs in its tuner's own environment, where roundexport may be missing: it needs numpy, torch, safetensors.
It leaves OUT/weights.safetensors, the dequantized weights [N, K] and whatever else the tuner changed, by parameter
name, and OUT/report.json: the tuner's version and how each quantized layer is stored.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Job:
    """One run: float model, token ids int64 [samples, length], folder for the answer, the tuner's own settings."""

    model: str
    ids: np.ndarray
    out: Path
    settings: dict

    @classmethod
    def from_arguments(cls) -> "Job":
        """The run that the command line asks for."""
        model, ids, out, settings = sys.argv[1:]
        return cls(model, np.load(ids), Path(out), json.loads(settings))


@dataclass(frozen=True)
class Stored:
    """How a layer is stored: bits per code, codes per group along K, and bits of scale and zero point per group."""

    bits: int
    group_size: int
    group_bits: int


def answer(job: Job, version: str, weights: dict[str, torch.Tensor], layers: dict[str, Stored]) -> None:
    """Write what a tuner made.

    Args:
        job: the run.
        version: of the tuner.
        weights: parameters that the tuner changed, by name; float32 unless the tuner gives less.
        layers: module name -> how it is stored, for every quantized linear.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().contiguous().clone() for name, value in weights.items()},
              job.out / "weights.safetensors")  # fmt: skip
    report = {"version": version, "layers": {name: asdict(stored) for name, stored in layers.items()}}
    (job.out / "report.json").write_text(json.dumps(report))


def block_linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linears inside the repeated blocks, which are what everybody quantizes; lm_head stays out."""
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not n.endswith("lm_head")}
