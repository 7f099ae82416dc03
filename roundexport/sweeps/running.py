"""One run of a sweep: a conversion in a folder of its own, and what came out as a row.

A run whose folder holds a finished conversion is not done again, and one that was interrupted goes on
(`convert`).  What one run cannot do is its row's error, and the others are done all the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roundexport.calibration.kept_samples import samples_kept
from roundexport.conversion.claimed_folder import RESULT
from roundexport.conversion.convert import convert
from roundexport.errors import Interrupted, RoundexportError
from roundexport.formats.package import read_package
from roundexport.progress import Progress

from .grid import SweepRun


@dataclass(frozen=True)
class Row:
    """What came out of a run, for one target.

    Args:
        about: model, recipe, bits, group.
        target: onnx or openvino; empty where the run failed before there was any.
        package: the folder; None where it failed.
        size: bytes of the package's files.
        bits_per_weight: all bits of quantized weights over their number.
        loss: mean KL in nats per token or text; of an encoder 1 - cosine.
        top1: agreement of the likeliest token or label.
        error: why there is nothing.
    """

    about: dict[str, Any]
    target: str
    package: Path | None = None
    size: int = 0
    bits_per_weight: float | None = None
    loss: float | None = None
    top1: float | None = None
    error: str = ""


def finished(run: SweepRun) -> bool:
    """Whether a run was done to its end."""
    return (run.folder / RESULT).is_file()


def do(run: SweepRun) -> str:
    """Do a run in a worker, silently; returns why it failed, or nothing."""
    return attempt(run, Progress(False))


def attempt(run: SweepRun, shown: Progress) -> str:
    """Do what is left of a run; returns why it failed, or nothing.

    Raises:
        Interrupted: on Ctrl-C; the same call goes on.
    """
    if finished(run):
        return ""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with samples_kept(run.samples):
            convert(run.model, run.folder, run.settings, to=run.targets, text=run.text, progress=shown)
    except Interrupted:
        raise
    except RoundexportError as error:
        return str(error)
    except Exception as error:  # of a library, or a fault of ours: the other runs are done all the same
        return f"{type(error).__name__}: {error}"
    return ""


def rows_of(run: SweepRun, error: str) -> list[Row]:
    """What is known of a run: a row per target."""
    if not finished(run):
        return [Row(run.about(), "", error=error or "not done")]
    found = json.loads((run.folder / RESULT).read_text(encoding="utf-8"))
    rows = []
    for target, report in found["quality"].items():
        package = run.folder / target
        files = read_package(package, check_hashes=False).files
        loss, top1 = _lost(report["quality"])
        size = sum(entry["size"] for entry in files.values())
        rows.append(Row(run.about(), target, package, size, found["bits_per_weight"], loss, top1))
    return rows


def _lost(quality: dict[str, Any]) -> tuple[float | None, float | None]:
    """Loss and agreement, by what the task has."""
    if "kl" in quality:
        agreement = quality.get("top1", quality.get("agreement"))
        return quality["kl"]["mean"], None if agreement is None else agreement["mean"]
    if "cosine" in quality:
        return 1 - quality["cosine"]["mean"], None
    return None, None
