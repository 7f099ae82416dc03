"""Our side of compare.py (see side.py); settings hold the flags of ``roundexport tune``.

Tuning runs through the command line, as a user would; it reads the calibration text itself, and the token ids that the
artifact names must be those that the others got.  Flags may quantize embeddings and lm_head, as of an artifact that is
to be exported too; what is compared are the blocks.
"""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from side import Job, Stored, answer

from roundexport.calibration.samples import ids_digest
from roundexport.formats.artifact import Artifact


def tune(job: Job) -> Path:
    """Run ``roundexport tune``; returns the artifact's folder."""
    artifact = job.out / "artifact"
    command = [str(Path(sys.executable).with_name("roundexport")), "tune", job.model, str(artifact)]
    subprocess.run([*command, "--embedding-bits", "none", *job.settings["flags"]], check=True)
    return artifact


def in_blocks(artifact: Artifact) -> list[str]:
    """Every layer but tables and heads, which stay float for everybody."""
    kinds = {name: artifact.entry(name).info.kind for name in artifact.names()}
    return [name for name, kind in kinds.items() if kind != "embedding" and not name.endswith("lm_head")]


def dequantized(artifact: Artifact) -> dict[str, torch.Tensor]:
    """The blocks' weights [N, K], and the float tensors that tuning changed."""
    weights = {f"{name}.weight": torch.from_numpy(artifact.linear(name).dequantize()) for name in in_blocks(artifact)}
    return weights | {name: torch.from_numpy(value) for name, value in artifact.overrides().items()}


def stored(artifact: Artifact) -> dict[str, Stored]:
    """As our packages hold them: zero points take as many bits as a code (the artifact itself gives them a byte)."""
    layers = {}
    for name in in_blocks(artifact):
        entry = artifact.entry(name)
        bits, spec = entry.spec.bits, entry.spec
        group_bits = spec.scale_bits + (0 if spec.symmetric else bits)
        layers[name] = Stored(bits, spec.group_width(entry.info.in_features), group_bits)
    return layers


if __name__ == "__main__":
    job = Job.from_arguments()
    made = Artifact.open(tune(job))
    taken = made.manifest.calibration  # a recipe may take the first of the samples, or need none
    if taken.get("ids_sha256") not in (None, ids_digest(job.ids[: taken.get("num_samples")])):
        sys.exit("the artifact was calibrated on other tokens than the comparison's")
    answer(job, version("roundexport"), dequantized(made), stored(made))
