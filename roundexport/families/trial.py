"""One family, tried: built, tuned by round-to-nearest in 8 bits, exported to each target, compared with transformers.

    configurations.json ──toy.py──▶ model folder ──tune──▶ artifact ──export──▶ package ──comparing.py──▶ Outcome
                                         └──────────────── from_pretrained ────────────────┘

Eight bits hold these weights exactly, so the model to compare with is the one that transformers loads from the folder.
"""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from roundexport.calibration.images import drawn_pixels
from roundexport.calibration.waveforms import drawn_samples
from roundexport.conversion.tune import tune
from roundexport.errors import RoundexportError, WrongOutputsError
from roundexport.formats.artifact import Artifact
from roundexport.graph.kept_captures import captures_kept
from roundexport.model.checkpoint import Checkpoint
from roundexport.targets.check import check_layers
from roundexport.targets.fused_attention import fused_attention
from roundexport.targets.interface import load_target
from roundexport.targets.pair_outputs import pair_inputs
from roundexport.tuning.settings import TuneSettings
from roundexport.types import OF_IMAGES, PAIRS, WITHOUT_TOKENS

from .comparing import difference
from .configurations import Family
from .row import Outcome, Row
from .toy import write_model

if TYPE_CHECKING:
    from torch import nn

    from roundexport.formats.package import PackageManifest

    from .comparing import Package

_SAMPLES = 2000  # of a sound
_LONGEST = 600  # characters of a reason
_ANSWER, _FIRST, _SEED = 24, 4, 1  # tokens of an answer; ids below are special ones
SETTINGS = TuneSettings(recipe="rtn", bits=8, group_size=32)


def tried(family: Family, targets: Sequence[str]) -> Row:
    """What a family comes to on each target; whatever is raised on the way is in the row.

    Args:
        family: which.
        targets: names of targets.
    """
    began, task, outcomes = time.monotonic(), "", dict[str, Outcome]()
    with tempfile.TemporaryDirectory(prefix="roundexport-family-") as scratch:
        folder = Path(scratch)
        try:
            write_model(family, folder / "model")
            checkpoint = Checkpoint.open(folder / "model", progress=False)
            task = checkpoint.task
            tune(folder / "model", folder / "artifact", SETTINGS, progress=False)
            with captures_kept():
                outcomes = {target: _on(target, folder, family, checkpoint) for target in targets}
        except Exception as error:  # strangers' code raises whatever it pleases, and the next family is waiting
            outcomes = {target: outcomes.get(target, _outcome_of(error, folder)) for target in targets}
    ordered = {target: outcomes[target] for target in targets}
    return Row(family.name, family.model, task, ordered, round(time.monotonic() - began, 1))


def _on(target: str, folder: Path, family: Family, checkpoint: Checkpoint) -> Outcome:
    try:
        package = _package(target, folder, checkpoint)
        model = _model(family, folder / "model", checkpoint.task)
        found = difference(package, model, _inputs(package.manifest, checkpoint))
        outcome = Outcome(found.largest, where=found.where, own=found.own)
        if checkpoint.task in PAIRS or checkpoint.task in WITHOUT_TOKENS:
            return outcome
        fused = fused_attention(folder / target)
        return replace(outcome, attention=fused.fused, layers=fused.layers)
    except Exception as error:
        return _outcome_of(error, folder)


def _package(target: str, folder: Path, checkpoint: Checkpoint) -> Package:
    """A package opened, without export's own comparison of outputs, in whose place ours stands."""
    from roundexport.runtime.loading import load

    artifact, kind, out = Artifact.open(folder / "artifact"), load_target(target), folder / target
    check_layers(kind, target, [(artifact.entry(name).info, artifact.entry(name).spec) for name in artifact.names()])
    out.mkdir()
    kind.export(artifact, checkpoint, out, kind.read_settings(target, {}))
    package: Any = load(out, check_hashes=False, precise=True)
    return package  # type: ignore[no-any-return]


def _inputs(manifest: PackageManifest, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What goes into a package of which token ids alone are not enough."""
    if manifest.task in OF_IMAGES:
        return {"pixel_values": drawn_pixels(checkpoint, 3, _SEED)}
    if manifest.task == "ctc":
        return {"input_values": drawn_samples(3, _SAMPLES, _SEED)}
    if manifest.task not in PAIRS:
        return None
    usual = np.arange(_FIRST, manifest.vocab_size)
    return pair_inputs(manifest, checkpoint, usual, min(_ANSWER, manifest.max_context), _SEED)


def _model(family: Family, folder: Path, task: str) -> nn.Module:
    """The model as transformers loads it, without anything of ours."""
    import torch
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    name = family.part or ("AutoModel" if task == "embed" else family.model)
    kind = getattr(transformers, name)
    return kind.from_pretrained(  # type: ignore[no-any-return]
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()


def _outcome_of(error: Exception, folder: Path) -> Outcome:
    """A deliberate error is a refusal, unless it says that outputs differ; any other is a failure, with its place."""
    text = _without(" ".join(str(error).split()), folder)[:_LONGEST]
    if isinstance(error, RoundexportError) and not isinstance(error, WrongOutputsError):
        return Outcome(refused=text)
    if isinstance(error, WrongOutputsError):
        return Outcome(failed=text)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return Outcome(failed=f"{type(error).__name__}: {text} ({Path(frame.filename).name}, line {frame.lineno})")


def _without(text: str, folder: Path) -> str:
    """A message without the path of the trial's own folder."""
    return text.replace(f"{folder / 'model'}: ", "").replace(f"{folder}/", "")


def tried_as_json(family: Family, targets: Sequence[str]) -> Mapping[str, Any]:
    """The same as a JSON object, to be sent from one process to another."""
    return tried(family, targets).to_json()
