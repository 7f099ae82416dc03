"""Model in, verified packages out: tune, export to every target asked for, verify each, in one call.

OUT/artifact   the tuned integers          OUT/onnx, OUT/openvino   packages          OUT/quality.json   what was lost
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .artifact import Artifact
from .atomic import replace_file
from .checkpoint import Checkpoint
from .errors import UsageError
from .exporting import export
from .quality import QualityReport, check_gates, verify
from .targets.report import ExportReport
from .tuning import tune


@dataclass(frozen=True)
class Conversion:
    """What `convert` made.

    Args:
        artifact: the artifact folder.
        packages: target -> package folder.
        exports: target -> export report.
        quality: target -> figures against the float model.
        bits_per_weight: all artifact bits over quantised weights.
    """

    artifact: Path
    packages: dict[str, Path]
    exports: dict[str, ExportReport]
    quality: dict[str, QualityReport]
    bits_per_weight: float

    def to_json(self) -> dict[str, Any]:
        """The conversion as a JSON object."""
        return {
            "artifact": str(self.artifact),
            "bits_per_weight": self.bits_per_weight,
            "packages": {name: str(path) for name, path in self.packages.items()},
            "exports": {name: report.to_json() for name, report in self.exports.items()},
            "quality": {name: report.to_json() for name, report in self.quality.items()},
        }


def convert(  # noqa: PLR0913  (the parameters are the verb's flags)
    model: str | Path,
    out: str | Path,
    *,
    to: str | Sequence[str] = ("onnx", "openvino"),
    algorithm: str = "signround",
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool | None = None,
    embedding_bits: int | None = 8,
    calibration: str = "self",
    num_samples: int = 128,
    sample_len: int = 512,
    steps: int = 200,
    batch_size: int = 8,
    seed: int = 42,
    device: str = "cpu",
    text: str | Path | None = None,
    max_kl: float | None = None,
    progress: bool = True,
) -> Conversion:
    """Tune a model, export it to each target and verify each package against the float model.

    Args:
        model: Hugging Face model folder or hub id.
        out: folder to make; an interrupted run in it is resumed, finished parts are kept.
        to: targets, as a list or comma-separated: ``onnx``, ``openvino``.
        algorithm: rounding method.
        bits: 2, 3, 4 or 8.
        group_size: weights sharing a scale; None for whole rows.
        symmetric: None: symmetric at 4 and 8 bits, asymmetric at 2 and 3.
        embedding_bits: 8 or 4 for embeddings and lm_head; None keeps them float.
        calibration: ``self``, a text file, or a Hugging Face dataset id.
        num_samples: calibration samples.
        sample_len: tokens per sample.
        steps: tuning steps per block.
        batch_size: samples per step.
        seed: seed of everything random.
        device: where tuning runs.
        text: held-out text file for verification; sampled from the model when absent.
        max_kl: gate on mean KL, nats per token.
        progress: show progress on stderr.

    Returns:
        Where everything is and what it cost.

    Raises:
        UsageError: ``out`` holds a finished conversion already, or a parameter makes no sense.
        GateError: never; failed gates are listed in each report's ``failures``.
    """
    targets = [t.strip() for t in to.split(",")] if isinstance(to, str) else list(to)
    folder = Path(out)
    _check_targets(targets)
    check_gates(Checkpoint.open(model).task, max_kl=max_kl)
    if (folder / "quality.json").exists():
        raise UsageError(f"{folder} holds a finished conversion; choose another output folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    artifact = folder / "artifact"
    if not (artifact / "manifest.json").exists():
        tune(
            model, artifact, algorithm=algorithm, bits=bits, group_size=group_size, symmetric=symmetric,
            embedding_bits=embedding_bits, calibration=calibration, num_samples=num_samples, sample_len=sample_len,
            steps=steps, batch_size=batch_size, seed=seed, device=device, progress=progress,
        )  # fmt: skip
    exports, quality = {}, {}
    for name in targets:
        package = folder / name
        if not package.exists():
            exports[name] = export(artifact, package, to=name, model=model)
        quality[name] = verify(package, against=model, artifact=artifact, text=text, max_kl=max_kl)
    done = Conversion(
        artifact=artifact,
        packages={name: folder / name for name in targets},
        exports=exports,
        quality=quality,
        bits_per_weight=Artifact.open(artifact, check_hashes=False).bits_per_weight,
    )
    replace_file(folder / "quality.json", (json.dumps(done.to_json(), indent=1, default=str) + "\n").encode())
    return done


def _check_targets(targets: list[str]) -> None:
    from . import discovery

    known = discovery.names("targets")
    unknown = [t for t in targets if t not in known]
    if unknown or not targets or len(set(targets)) != len(targets):
        raise UsageError(f"--to {','.join(targets)!r}: name each target once; known: {', '.join(known)}")
