"""`import_checkpoint`: weights that others have quantized as an artifact of the very same integers; nothing is tuned.

    gptq, awq, auto-round, … folder ─ model/checkpoint.py ─ integers as they are ─ artifact ─ export, verify as ever

The artifact's source is the folder itself: what is float in it stays float, and `verify` compares packages with its
dequantized weights.  What its own tuning has lost against the float model it was made from is not measured here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .formats.artifact_writer import ArtifactWriter
from .model.artifact_source import artifact_source
from .model.checkpoint import Checkpoint
from .progress import Progress
from .quant.spec import LayerKind, LinearInfo, QuantSpec
from .storage.atomic import write_folder
from .tuning.settings import TuneSettings
from .versions import library_versions

if TYPE_CHECKING:
    from torch import nn

_OF_IMPORTS = ("part", "max_ram")  # settings that mean something where nothing is tuned
_LARGEST_RECORD = 1 << 16  # characters of a quantization_config that a manifest keeps


def import_checkpoint(
    model: str | Path, out: str | Path, *, part: str | None = None, progress: bool | Progress = True
) -> Path:
    """Write the integers of a quantized checkpoint as an artifact.

    Args:
        model: folder or hub id of a checkpoint whose config.json has a quantization_config.
        out: artifact folder to make; must not exist.
        part: of a folder that holds several models, see parts.py.
        progress: report on stderr, or where to report.

    Returns:
        The artifact folder.

    Raises:
        UsageError: ``out`` exists, or the checkpoint is a float one.
        CheckpointError: it cannot be read, or contradicts itself.
        UnsupportedError: its format is not read, or holds what ``(code - zero_point) · scale`` cannot.
    """
    with Progress.of(progress) as shown, shown.stage(f"importing {model}"):
        checkpoint = Checkpoint.open(model, progress=shown, part=part)
        if checkpoint.imported is None:
            raise UsageError(f"{model} is a float model, in which there are no integers: roundexport tune makes some")
        checkpoint.check_side_files()
        for sentence in said(checkpoint):
            shown.say(sentence)
        with write_folder(Path(out)) as folder, shown.stage("reading and checking every integer"):
            _write(checkpoint, folder)
    return Path(out)


def said(checkpoint: Checkpoint) -> Iterator[str]:
    """What a user must hear of an import, in sentences."""
    if checkpoint.imported is None:
        return
    opened = checkpoint.imported.opened
    yield (
        f"{checkpoint.location} is quantized already ({opened.title}): the integers of its {len(opened.layers)} layers "
        "are taken as they are and nothing is tuned"
    )
    yield from (f"note: {note}" for note in opened.notes)


def imported_layers(checkpoint: Checkpoint) -> tuple[tuple[LinearInfo, QuantSpec], ...]:
    """The quantized layers of a checkpoint in the model's order, with their schemes; every integer is read and checked.

    Raises:
        CheckpointError: numbers that make no sense.
        UnsupportedError: layers that cannot be held exactly.
    """
    return tuple(_layers(checkpoint, _skeleton(checkpoint)))


def refuse_settings(settings: TuneSettings, checkpoint: Checkpoint) -> None:
    """Refuse settings of tuning where nothing will be tuned, as the checkpoint is quantized.

    Raises:
        UsageError: naming them.
    """
    if checkpoint.imported is None:
        return
    asked, usual = settings.to_json(), TuneSettings().to_json()
    changed = [name for name in asked if asked[name] != usual[name] and name not in _OF_IMPORTS]
    if changed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise UsageError(
            f"{checkpoint.location} is quantized already: its integers are taken as they are, so {flags} can have no "
            "effect; leave it out, or give the float model to tune it"
        )


def _skeleton(checkpoint: Checkpoint) -> nn.Module:
    from .model.skeleton import build_skeleton

    return build_skeleton(checkpoint)


def _write(checkpoint: Checkpoint, folder: Path) -> None:
    skeleton = _skeleton(checkpoint)
    layers = list(_layers(checkpoint, skeleton))
    writer = ArtifactWriter(folder, layers)
    try:
        for info, _ in layers:
            linear = checkpoint.quantized(info.name)
            assert linear is not None  # as _layers found
            writer.add(info.name, linear)
        writer.finish(
            source=artifact_source(checkpoint),
            algorithm={"name": "imported", "settings": _record(checkpoint)},
            calibration={"kind": "none"},
            kept_float=list(
                _kept_float(skeleton, {name for info, _ in layers for name in (info.name, *info.shared_with)})
            ),
            versions=library_versions(),
            side_files=checkpoint.copy_side_files(folder),
        )
    finally:
        writer.close()


def _layers(checkpoint: Checkpoint, skeleton: nn.Module) -> Iterator[tuple[LinearInfo, QuantSpec]]:
    """Every quantized module once, in the model's order, with the others that own its weight."""
    from torch.nn import Embedding

    owners: dict[int, list[str]] = {}
    for name, module in skeleton.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 2:
            owners.setdefault(id(weight), []).append(name)
    modules = dict(skeleton.named_modules())
    for name, *others in owners.values():
        linear = checkpoint.quantized(name)
        if linear is not None:
            kind: LayerKind = "embedding" if isinstance(modules[name], Embedding) else "linear"
            shared = tuple(dict.fromkeys(others))
            yield LinearInfo(name, linear.in_features, linear.out_features, kind, shared), linear.spec


def _kept_float(skeleton: nn.Module, planned: set[str]) -> Iterator[tuple[str, str]]:
    for name, module in skeleton.named_modules():
        if name not in planned and any(own.ndim > 1 for own in module.parameters(recurse=False)):
            yield name, "float in the checkpoint"


def _record(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the manifest keeps of where the integers are from."""
    assert checkpoint.imported is not None
    opened = checkpoint.imported.opened
    kept: Any = dict(opened.config)
    return {"format": opened.format, "quantization_config": kept if len(str(kept)) <= _LARGEST_RECORD else "too long"}
