"""The state on disk of a tuning run, from which the next run resumes after an interruption.

    <out>.partial/
        tuning.json                  marks the folder as ours (state_folder.py)
        state.json                   written last, by atomic replacement: what is done, and by which settings
        calibration.safetensors      ids I64 [n, S], or pixels F32 [n, C, height, width]
        factors.safetensors          F32: what was trained for all blocks at once, as 0000k.name (chosen_methods.py)
        hidden-0000k.safetensors     quantized, floats F32 [n, S, H]: what enters block k (hidden_states.py)
        fisher-0000k.safetensors     F32 [N, R]: what an error of each output costs the model (output_fisher.py)
        overrides-0000k.safetensors  F32: parameters that a transformation changed in block k, by name
        artifact/                    the artifact so far; renamed to <out> at the end

While a block is tuned, the hidden states after it are written to a file beside those before it.  When it is done, its
integers are synced, then that file; then state.json is replaced, and what only that block needed is removed: the old
hidden states, and its measure.  At any moment of a kill or a power cut, state.json names only complete files.  A block
that was not finished is tuned again from the same states with the same seed, so the bytes are the same.

state.json holds the sha256 of every finished layer and of the small files, which a resuming run checks first.  Hidden
states are large; only their header is checked.  Nothing is pickled.  A lock allows one process at a time to write
``<out>`` (locks.py); it ends with its process.

A state belongs to its settings, model and library versions.  A run with others is refused, with the difference.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from roundexport.algorithms.interface import Factors
from roundexport.calibration.samples import Calibration
from roundexport.errors import ArtifactError, UsageError
from roundexport.formats.layer_digests import layer_digests
from roundexport.storage.atomic import make_parents, remove_empty, replace_file, sync, sync_folder
from roundexport.storage.checksums import sha256_file
from roundexport.storage.disk_errors import explained
from roundexport.storage.locks import writing
from roundexport.storage.paths import safe_join
from roundexport.storage.safetensors_reader import TensorFile
from roundexport.storage.strict_json import decode, encode, parse_format

from .hidden_states import Hidden
from .state_folder import FORMAT, STATE, again, claim, clear, folder_of, refuse_existing
from .tensor_files import read_tensors, write_synced

IDS, FACTORS = "calibration.safetensors", "factors.safetensors"
Replay = Literal["outputs", "scores", "activations"]
"""Work that replays the float model before the blocks' turn (memory_need.py); a state keeps what it found."""
_KEPT_AS: dict[Replay, str] = {"outputs": "fisher", "scores": "mix", "activations": "activations"}


@dataclass(frozen=True)
class _Document:
    """state.json."""

    settings: dict[str, Any]
    calibration: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    layers_done: tuple[str, ...] = ()
    blocks_done: int = 0
    losses: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    mix: dict[str, Any] | None = None
    activations: dict[str, Any] | None = None  # what those in 8 bits cost
    fisher: bool = False  # measured, of every block
    factors: tuple[float, float] | None = None  # loss before and after; the rest is in a file
    layer_sha256: dict[str, str] = field(default_factory=dict)  # of layers_done
    file_sha256: dict[str, str] = field(default_factory=dict)  # of calibration, factors, fisher and overrides
    format: str = FORMAT


class TuneState:
    """The state folder of one run; made by :func:`open_state`.

    Attributes:
        folder: ``<out>.partial``.
        artifact: the folder in which the artifact grows.
    """

    def __init__(self, folder: Path, document: _Document) -> None:
        self.folder = folder
        self.artifact = folder / "artifact"
        self._document = document
        self._unrecorded: dict[str, str] = {}  # sha256 of files that belong to the block being tuned
        self.artifact.mkdir(exist_ok=True)

    @property
    def blocks_done(self) -> int:
        """Blocks that are complete."""
        return self._document.blocks_done

    @property
    def layers_done(self) -> tuple[str, ...]:
        """Names of layers whose integers are in the artifact."""
        return self._document.layers_done

    @property
    def holds_work(self) -> bool:
        """Whether a run can go on from here: it has samples, scores, measures, factors or layers."""
        return self._document != _Document(self._document.settings)

    @property
    def losses(self) -> dict[str, tuple[float | None, float | None]]:
        """Layer -> loss before and after, of the layers that are done."""
        return self._document.losses

    @property
    def bit_allocation(self) -> dict[str, Any] | None:
        """The plan of schemes that the run was begun with, where bits are chosen per layer; see allocate.py."""
        return self._document.mix

    def record_bit_allocation(self, allocation: dict[str, Any]) -> None:
        """Keep the plan of schemes."""
        self._replace(mix=allocation)

    @property
    def activations(self) -> dict[str, Any] | None:
        """What activations in 8 bits cost each layer, once that was measured; see activation_loss.py."""
        return self._document.activations

    def record_activations(self, measured: dict[str, Any]) -> None:
        """Keep what activations in 8 bits cost."""
        self._replace(activations=measured)

    @property
    def replayed(self) -> list[Replay]:
        """Work on the float model that is done."""
        return _replayed(vars(self._document))

    def calibration(self) -> Calibration | None:
        """The calibration samples of the run, once they were recorded."""
        if self._document.calibration is None:
            return None
        ids = np.array(TensorFile(self.folder / IDS).read("ids"))  # int64 token ids, or float32 pixels
        return Calibration(ids, self._document.calibration, self._document.notes)

    def record_calibration(self, calibration: Calibration) -> None:
        """Keep the calibration samples."""
        kind = "F32" if calibration.ids.dtype == np.float32 else "I64"
        digest = write_synced(self.folder / IDS, {"ids": (kind, calibration.ids)})
        self._replace(calibration=calibration.identity, notes=calibration.notes, file_sha256=self._files(IDS, digest))

    def factors(self) -> Factors | None:
        """What a transformation of the whole model learned, once it was recorded."""
        if self._document.factors is None:
            return None
        blocks: dict[int, dict[str, Tensor]] = {}
        for key, tensor in read_tensors(self.folder / FACTORS).items():
            index, _, name = key.partition(".")
            blocks.setdefault(int(index), {})[name] = tensor
        return Factors(blocks, *self._document.factors)

    def record_factors(self, factors: Factors) -> None:
        """Keep what a transformation of the whole model learned."""
        tensors = {
            f"{index:05}.{name}": ("F32", theta.numpy())
            for index, own in factors.blocks.items()
            for name, theta in own.items()
        }
        digest = write_synced(self.folder / FACTORS, tensors)
        losses = (factors.loss_before, factors.loss_after)
        self._replace(factors=losses, file_sha256=self._files(FACTORS, digest))

    @property
    def fisher_measured(self) -> bool:
        """Whether :meth:`fisher` names files that hold what an error of each output costs the model."""
        return self._document.fisher

    def fisher(self, block: int) -> Path:
        """The file of that measure of a block."""
        return self.folder / f"fisher-{block:05}.safetensors"

    def add_fisher(self, block: int, sums: Mapping[str, Tensor]) -> None:
        """Write the measure of a block; :meth:`record_fisher` says that there is one of all."""
        path = self.fisher(block)
        tensors = {name: ("F32", tensor.numpy()) for name, tensor in sums.items()}
        self._unrecorded[path.name] = write_synced(path, tensors)

    def record_fisher(self) -> None:
        """Record that the measures of all blocks were written."""
        self._replace(fisher=True, file_sha256={**self._document.file_sha256, **self._unrecorded})
        self._unrecorded.clear()

    def record_layers(self, names: Sequence[str]) -> None:
        """Record layers outside the blocks whose integers were written and synced."""
        self._replace(layers_done=tuple(dict.fromkeys((*self.layers_done, *names))), layer_sha256=self._layers(names))

    def record_block(
        self,
        losses: Mapping[str, tuple[float | None, float | None]],
        hidden: Hidden | None,
    ) -> None:
        """Record one more block whose integers were written and synced.

        Args:
            losses: its layers' losses.
            hidden: what :meth:`begin_hidden` gave, filled; None when nobody will need hidden states any more.
        """
        done = self.blocks_done + 1
        if hidden is not None:
            hidden.sync()
            sync(self.folder)
        recorded = {**self._document.file_sha256, **self._unrecorded}
        recorded.pop(self.fisher(done - 1).name, None)
        self._replace(
            layers_done=(*self.layers_done, *losses),
            blocks_done=done,
            losses={**self.losses, **losses},
            layer_sha256=self._layers(list(losses)),
            file_sha256=recorded,
        )
        _remove([*self._only_for(done - 1), *([self._hidden(done)] if hidden is None else [])])

    def remove_spent(self) -> None:
        """Remove what blocks needed that are done: a run that was killed may not have come to it."""
        _remove([path for block in range(self.blocks_done) for path in self._only_for(block)])

    def begin_hidden(self, block: int, shape: tuple[int, int, int]) -> Hidden:
        """A file for the hidden states [n, S, H] that will enter a block: the next one, or the one after it.

        Raises:
            WontFitError: the disk cannot hold it.
        """
        return Hidden.create(self._hidden(block), shape, {"format": FORMAT})

    def hidden(self) -> Hidden | None:
        """Hidden states that enter the next block, as recorded; None before the first block is done."""
        return Hidden.open(self._hidden(self.blocks_done)) if self.blocks_done else None

    def record_overrides(self, block: int, overrides: Mapping[str, Tensor]) -> None:
        """Keep parameters that changed in a block, before :meth:`record_block` says that it is done."""
        if overrides:
            path = self._overrides(block)
            tensors = {name: ("F32", tensor.numpy()) for name, tensor in overrides.items()}
            self._unrecorded[path.name] = write_synced(path, tensors)

    def overrides(self, block: int) -> dict[str, Tensor]:
        """What :meth:`record_overrides` was given for a block that is done."""
        path = self._overrides(block)
        return read_tensors(path) if path.exists() else {}

    def publish(self, out: Path, finished: Path | None = None) -> None:
        """Rename the finished artifact to ``out`` and remove the state.

        Args:
            out: where to.
            finished: the artifact, where it is another than :attr:`artifact`.

        Raises:
            UsageError: ``out`` appeared meanwhile.
        """
        source = finished or self.artifact
        sync_folder(source)
        if os.path.lexists(out):
            raise UsageError(f"{out} appeared while it was being written; remove it, and run again to finish")
        os.rename(source, out)
        sync(out.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the state."""
        shutil.rmtree(self.folder)

    def _layers(self, names: Sequence[str]) -> dict[str, str]:
        return {**self._document.layer_sha256, **layer_digests(self.artifact, names)}

    def _files(self, name: str, digest: str) -> dict[str, str]:
        return {**self._document.file_sha256, name: digest}

    def _overrides(self, block: int) -> Path:
        return self.folder / f"overrides-{block:05}.safetensors"

    def _only_for(self, block: int) -> tuple[Path, ...]:
        """Files that nobody needs once the block is done."""
        return self._hidden(block), self.fisher(block)

    def _hidden(self, block: int) -> Path:
        return self.folder / f"hidden-{block:05}.safetensors"

    def _replace(self, **changes: Any) -> None:
        self._document = replace(self._document, **changes)
        replace_file(self.folder / STATE, encode(self._document))


@contextmanager
def open_state(out: Path, settings: dict[str, Any], resume: bool) -> Iterator[TuneState]:
    """Take up the state an earlier run left for ``out``, or begin one.

    Args:
        out: the artifact folder to be made.
        settings: everything that decides the result, as JSON values.
        resume: resume from an earlier state; False removes it and starts over.

    Yields:
        The state, locked for this process.

    Raises:
        UsageError: ``out`` exists, another process is writing it, or the earlier run had other settings.
    """
    out = Path(os.path.abspath(out))
    folder = folder_of(out)
    refuse_existing(out)
    made = make_parents(out.parent)
    with explained(folder), writing(out):
        try:
            claim(folder)
            document = _earlier(folder, settings) if resume else None
            if document is None:
                document = _Document(settings)
                clear(folder)
                replace_file(folder / STATE, encode(document))
            for entry in (folder / "artifact").glob(".*.partial-*"):  # a file that a killed run was about to rename
                entry.unlink()
            state = TuneState(folder, document)
            state.remove_spent()
            yield state
        finally:
            if not folder.exists() and not out.exists():  # given up: nothing is left
                remove_empty(made)


def replayed(folder: Path) -> list[Replay]:
    """Work on the float model that is done, as a state folder has it."""
    try:
        found = json.loads((folder / STATE).read_bytes())
    except (OSError, ValueError):
        return []
    return _replayed(found) if isinstance(found, dict) else []


def _replayed(document: Mapping[str, Any]) -> list[Replay]:
    return [work for work, field in _KEPT_AS.items() if document.get(field) not in (None, False)]


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except PermissionError:  # Windows keeps what is mapped; it goes with the state
            if os.name == "posix":
                raise


def _earlier(folder: Path, settings: dict[str, Any]) -> _Document | None:
    """The state of an earlier run; None where it had not come far enough to record one."""
    path = folder / STATE
    if not path.is_file() or not (folder / "artifact").is_dir():
        return None
    try:
        document = decode(_Document, parse_format(path.read_bytes(), FORMAT, str(path)), str(path))
    except ArtifactError as error:
        raise UsageError(f"{error}; {again(folder)}") from error
    keys = sorted(document.settings.keys() | settings.keys())
    changed = [key for key in keys if document.settings.get(key) != settings.get(key)]
    if changed:
        was = ", ".join(f"{key} was {document.settings.get(key)!r}, now {settings.get(key)!r}" for key in changed)
        raise UsageError(
            f"{folder} holds an interrupted run with other settings ({was}); finish it with its own settings; "
            f"{again(folder)}"
        )
    _check_bytes(folder, document)
    return document


def _check_bytes(folder: Path, document: _Document) -> None:
    """Hold what an earlier run finished against the hashes that it recorded."""
    try:
        found = layer_digests(folder / "artifact", document.layers_done)
        recorded = document.layer_sha256
        damaged = [f"layer {name}" for name in document.layers_done if found.get(name) != recorded.get(name)]
        for name, digest in sorted(document.file_sha256.items()):
            path = safe_join(folder, name)
            if not path.is_file() or sha256_file(path) != digest:
                damaged.append(name)
    except ArtifactError as error:
        raise UsageError(f"{error}; the interrupted run is damaged: {again(folder)}") from error
    if damaged:
        raise UsageError(
            f"{folder}: {damaged[0]} is not what the interrupted run wrote ({len(damaged)} damaged in all); "
            f"{again(folder)}"
        )
