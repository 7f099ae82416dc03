"""Finishing in a tuning run: the finisher trains the whole quantized model; an artifact in, an artifact out.

The artifact of the blocks stays unchanged until the finished one is complete beside it.  The finisher saves its state
every few minutes (finisher_state.py), and an interrupted run resumes from it.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from roundexport.algorithms.finishing import FinishInputs, FinishResult
from roundexport.calibration.loss_mask import loss_mask
from roundexport.calibration.self_generated import Written, can_write
from roundexport.formats.artifact import Artifact
from roundexport.formats.artifact_writer import ArtifactWriter
from roundexport.model.block_call import capture_calls, first_hidden
from roundexport.model.blocks import weight_of
from roundexport.model.streamed_model import StreamedModel

from .chosen_methods import ChosenFinisher
from .finisher_state import FinisherStateFolder

if TYPE_CHECKING:
    from roundexport.model.checkpoint import Checkpoint


Write = Callable[[int, int, int], Written]
"""(count, length, seed) -> samples that the model writes."""


@dataclass(frozen=True, eq=False)
class Samples:
    """What the finish is tuned on.

    Args:
        ids: token ids [n, S].
        mask: [n, S], 1 where a position counts.
        seed: of their order.
    """

    ids: Tensor
    mask: Tensor
    seed: int


@dataclass(frozen=True, eq=False)
class Place:
    """Where a finisher works.

    Args:
        tuned: the artifact of the blocks.
        out: folder for the finished one, in that of the run's state; what an earlier run left in it is removed.
        device: where to compute.
        report: called with the share that is done.
    """

    tuned: Path
    out: Path
    device: torch.device
    report: Callable[[float], None]


def finish_artifact(
    finisher: ChosenFinisher, weights: StreamedModel, samples: Samples, place: Place, *, transformed: bool, write: Write
) -> tuple[tuple[float, float], ...]:
    """Tune an artifact's model as a whole and write what became of it.

    Args:
        finisher: how.
        weights: the float model; not changed.
        samples: calibration samples.
        place: folders, device, progress.
        transformed: a transform changed the blocks before they were rounded.
        write: writes samples of the model's own, where the finish asks for more.

    Returns:
        Losses before and after, per window.
    """
    out = place.out
    artifact = Artifact.open(place.tuned, check_hashes=False)
    given = len(samples.ids)
    samples, by = _with_written(samples, weights.checkpoint, finisher.settings.written, write)
    weights = weights.reopen()  # a block of a model that is not streamed keeps what a transform did to it
    inputs = _inputs(artifact, weights, samples, finisher.settings.batch_size, transformed)
    inputs = dataclasses.replace(
        inputs, device=place.device, state=FinisherStateFolder(out.parent), report=place.report
    )
    with weights.tables(samples.ids):
        result: FinishResult = finisher.method.finish(inputs, finisher.settings)
    overrides, eight_bits = artifact.overrides(), artifact.vectors()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    writer = ArtifactWriter(out, [(artifact.entry(name).info, artifact.entry(name).spec) for name in artifact.names()])
    try:
        for name in artifact.names():
            writer.add(name, result.layers.get(name) or artifact.linear(name))
        for name, values in overrides.items():
            writer.add_override(name, eight_bits.get(name, values))
        for name, tensor in result.vectors.items():
            if name in overrides or not torch.equal(tensor, weights.read(name)):
                writer.add_override(name, tensor.numpy())
        manifest = artifact.manifest
        losses = [list(pair) for pair in result.losses]
        described = {**finisher.to_json(), "written_samples": len(samples.ids) - given, **by, "losses": losses}
        settings = {**manifest.algorithm["settings"], "finish": described}
        writer.finish(
            source=manifest.source,
            algorithm={"name": manifest.algorithm["name"], "settings": settings},
            calibration=manifest.calibration,
            kept_float=manifest.kept_float,
            versions=manifest.versions,
            losses={entry.info.name: (entry.loss_before, entry.loss_after) for entry in manifest.layers},
            side_files=weights.checkpoint.copy_side_files(out),
        )
    finally:
        writer.close()
    return result.losses


def _with_written(
    samples: Samples, checkpoint: Checkpoint, written: int, write: Write
) -> tuple[Samples, dict[str, str]]:
    """Samples and those that a decoder writes beside them where the finish asks for it, and who wrote those."""
    count = written * len(samples.ids)
    if not count or not can_write(checkpoint):
        return samples, {}
    found = write(count, samples.ids.shape[1], samples.seed + 1)
    more = torch.from_numpy(found.ids)
    masks = torch.cat([samples.mask, loss_mask(checkpoint, more)])
    joined = dataclasses.replace(samples, ids=torch.cat([samples.ids, more]), mask=masks)
    return joined, {f"written_{name}": value for name, value in found.identity.items()}


def _inputs(
    artifact: Artifact, weights: StreamedModel, samples: Samples, batch_size: int, transformed: bool
) -> FinishInputs:
    """What the finish of an artifact is given, but where and how to report."""
    stack, ids = weights.stack, samples.ids
    inside = tuple(f"{stack.block_name(index)}." for index in range(len(stack.blocks)))
    eight_bits = artifact.vectors()
    changed = {name: torch.tensor(values) for name, values in artifact.overrides().items()}
    outside = {name: changed.pop(name) for name in [*changed] if not name.startswith(inside)}
    names = [name for name, parameter in weights.model.named_parameters() if parameter.ndim == 1]
    vectors = {
        name: changed.pop(name) if name in changed else weights.read(name)
        for name in names
        if name.startswith(inside) and name not in eight_bits
    }
    distinct: Tensor = torch.unique(ids)
    float_rows = weights.token_rows(distinct)
    rows, tables = _tables(artifact, weights, inside, distinct)
    with weights.embedding(distinct, float_rows):
        with weights.streamed_forward():
            calls = capture_calls(weights.model, stack, ids)
        floats = first_hidden(weights.model, stack, ids, batch_size)
    before = {name: values for name, values in {**tables, **outside}.items() if not _absent(weights, name)}
    with weights.replaced(before), weights.embedding(distinct, float_rows if rows is None else rows):
        start = first_hidden(weights.model, stack, ids, batch_size)
    layers = {name: artifact.linear(name) for name in artifact.names() if name.startswith(inside)}
    return FinishInputs(
        weights, calls, ids, samples.mask, start, floats, {**tables, **outside}, layers, vectors, changed, transformed,
        samples.seed,
    )  # fmt: skip


def _tables(
    artifact: Artifact, weights: StreamedModel, inside: tuple[str, ...], ids: Tensor
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Rows of the quantized token embedding for ids [U], and the other quantized tables by parameter name."""
    rows, tables = None, {}
    for name in artifact.names():
        if name.startswith(inside):
            continue
        table = torch.from_numpy(artifact.linear(name).dequantize())
        for owner in (name, *artifact.entry(name).info.shared_with):
            if f"{owner}.weight" == weights.embedding_name:
                rows = table[ids]
                continue
            module = weights.model.get_submodule(owner)
            turned = weight_of(module).shape != module.get_parameter("weight").shape
            tables[f"{owner}.weight"] = table.t() if turned else table
    return rows, tables


def _absent(weights: StreamedModel, name: str) -> bool:
    """Whether a parameter is not in memory, as lm_head is not while embeddings are looked up."""
    return weights.model.get_parameter(name).is_meta
