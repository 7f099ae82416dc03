"""`import_checkpoint`: weights that others have quantized as an artifact of the very same integers; nothing is tuned.

    gptq, awq, auto-round, … folder ─ model/imported_weights.py ─┐
    GGUF file ─────────────────────── model/gguf_integers.py ────┴─ integers as they are ─ artifact ─ export, verify

The artifact's source is the folder itself: what is float in it stays float, and `verify` compares packages with its
dequantized weights.  What its own tuning has lost against the float model it was made from is not measured here.
A GGUF file is a float model to every other verb; imported are the weights in it that are integers around zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from roundexport.environment.memory import MemoryLimit
from roundexport.environment.versions import library_versions
from roundexport.errors import UnsupportedError, UsageError
from roundexport.formats.artifact_writer import ArtifactWriter
from roundexport.model.artifact_source import artifact_source
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.gguf_header import is_gguf, read_header
from roundexport.model.gguf_integers import GgufIntegers
from roundexport.model.weight_bytes import WeightBytes
from roundexport.progress import Progress
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import LayerKind, LinearInfo, QuantSpec
from roundexport.storage.atomic import write_folder
from roundexport.tuning.settings import TuneSettings

if TYPE_CHECKING:
    from torch import nn

_OF_IMPORTS = ("part", "max_ram")  # settings that mean something where nothing is tuned
_NAMED = 3  # modules that a sentence names
_LARGEST_RECORD = 1 << 16  # characters of a quantization_config that a manifest keeps


def import_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    part: str | None = None,
    max_ram: float | None = None,
    progress: bool | Progress = True,
) -> Path:
    """Write the integers of a quantized checkpoint as an artifact.

    Args:
        model: folder or hub id of a checkpoint whose config.json has a quantization_config, or a GGUF file.
        out: artifact folder to make; must not exist.
        part: of a folder that holds several models, see parts.py.
        max_ram: GiB of memory to stay within.
        progress: report on stderr, or where to report.

    Returns:
        The artifact folder.

    Raises:
        UsageError: ``out`` exists, or the checkpoint is a float one.
        CheckpointError: it cannot be read, or contradicts itself.
        UnsupportedError: its format is not read, or holds what ``(code - zero_point) · scale`` cannot.
        WontFitError: it takes more than ``max_ram``.
    """
    limit = MemoryLimit(max_ram)
    with Progress.of(progress) as shown, shown.stage(f"importing {model}"):
        checkpoint = Checkpoint.open(model, progress=shown, part=part, max_ram=max_ram)
        checkpoint.identify(shown)
        if checkpoint.imported is None and not is_gguf(model):
            raise UsageError(f"{model} is a float model, in which there are no integers: roundexport tune makes some")
        checkpoint.check_side_files()
        limit.check(
            "an import",
            {"the largest weight, as it is read, checked and packed": 2 * WeightBytes.of(checkpoint).largest},
            advice="use a machine with more memory",
        )
        for sentence in said(checkpoint):
            shown.say(sentence)
        integers = _FromFolder(checkpoint) if checkpoint.imported is not None else _FromGguf(checkpoint)
        with write_folder(Path(out)) as folder, shown.stage("reading and checking every integer"):
            kept = _write(checkpoint, integers, folder)
            for sentence in _left_float(kept):
                shown.say(sentence)
    return Path(out)


class Integers(Protocol):
    """Where the integers of a model's weights are."""

    def linear(self, module: str) -> QuantizedLinear | None:
        """The integers [N, K] of a module's weight; None: there are none that can be taken."""

    def why_float(self, module: str) -> str:
        """Why a module without integers stays float."""

    def record(self) -> dict[str, Any]:
        """What the manifest keeps of where they are from."""


class _FromFolder:
    """Of a checkpoint that an importer reads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def linear(self, module: str) -> QuantizedLinear | None:
        return self._checkpoint.quantized(module)

    def why_float(self, module: str) -> str:
        return "float in the checkpoint"

    def record(self) -> dict[str, Any]:
        assert self._checkpoint.imported is not None
        opened = self._checkpoint.imported.opened
        kept: Any = dict(opened.config)
        small = len(str(kept)) <= _LARGEST_RECORD
        return {"format": opened.format, "quantization_config": kept if small else "too long"}


class _FromGguf:
    """Of a GGUF file."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._file = GgufIntegers(read_header(Path(checkpoint.location)), checkpoint.config)

    def linear(self, module: str) -> QuantizedLinear | None:
        name = f"{module}.weight"
        if self._file.kind(name) is None or not self._checkpoint.has(name):
            return None
        return self._file.linear(name, self._checkpoint.float32(name))

    def why_float(self, module: str) -> str:
        kind = self._file.kind(f"{module}.weight")
        return "float in the file" if kind is None else f"{kind} is dequantized: not integers around a zero point"

    def record(self) -> dict[str, Any]:
        return {"format": "gguf"}


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
    return tuple(_layers(_FromFolder(checkpoint), _skeleton(checkpoint)))


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
    from roundexport.model.skeleton import build_skeleton

    return build_skeleton(checkpoint)


def _write(checkpoint: Checkpoint, integers: Integers, folder: Path) -> dict[str, str]:
    """Write the artifact; returns what stays float, with the reason."""
    skeleton = _skeleton(checkpoint)
    layers = list(_layers(integers, skeleton))
    planned = {name for info, _ in layers for name in (info.name, *info.shared_with)}
    kept = {name: integers.why_float(name) for name in _matrices(skeleton) if name not in planned}
    if not layers:
        raise UnsupportedError(
            f"{checkpoint.location}: none of its weights can be taken as integers; {'; '.join(_left_float(kept))}. To "
            "tune and convert the file is a float model: roundexport convert"
        )
    writer = ArtifactWriter(folder, layers)
    try:
        for info, _ in layers:
            linear = integers.linear(info.name)
            assert linear is not None  # as _layers found
            writer.add(info.name, linear)
        writer.finish(
            source=artifact_source(checkpoint),
            algorithm={"name": "imported", "settings": integers.record()},
            calibration={"kind": "none"},
            kept_float=list(kept.items()),
            versions=library_versions(),
            side_files=checkpoint.copy_side_files(folder),
        )
    finally:
        writer.close()
    return kept


def _left_float(kept: dict[str, str]) -> Iterator[str]:
    """What stays float, a sentence per reason: some modules by name, the rest by number."""
    for reason in dict.fromkeys(kept.values()):
        names = [name for name in kept if kept[name] == reason]
        rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        yield f"left float ({reason}): {', '.join(names[:_NAMED])}{rest}"


def _layers(integers: Integers, skeleton: nn.Module) -> Iterator[tuple[LinearInfo, QuantSpec]]:
    """Every quantized module once, in the model's order, with the others that own its weight."""
    from torch.nn import Embedding

    owners: dict[int, list[str]] = {}
    for name, module in skeleton.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 2:
            owners.setdefault(id(weight), []).append(name)
    modules = dict(skeleton.named_modules())
    for name, *others in owners.values():
        linear = integers.linear(name)
        if linear is not None:
            kind: LayerKind = "embedding" if isinstance(modules[name], Embedding) else "linear"
            shared = tuple(dict.fromkeys(others))
            yield LinearInfo(name, linear.in_features, linear.out_features, kind, shared), linear.spec


def _matrices(skeleton: nn.Module) -> Iterator[str]:
    """Modules with parameters of two dimensions and more."""
    for name, module in skeleton.named_modules():
        if any(own.ndim > 1 for own in module.parameters(recurse=False)):
            yield name
