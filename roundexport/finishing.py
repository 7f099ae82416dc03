"""Finishing in a tuning run: what blocks were rounded to, tuned once more as a whole; an artifact in, an artifact out.

The artifact that the blocks made stays as it is until the finished one is complete beside it.  What the finish itself
is at is written down every few minutes (finishstate.py), and a run that was killed goes on from there.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import discovery
from .artifact import Artifact, ArtifactWriter
from .blocks import BlockCall, Stack, capture_calls, find_stack, first_hidden, weight_of
from .errors import UsageError
from .finishstate import FinishState
from .quantized import QuantizedLinear

if TYPE_CHECKING:
    from .checkpoint import Checkpoint


@dataclass(frozen=True, eq=False)
class FinishInputs:
    """What a finish is given.

    Args:
        model: the float model, in memory; its token embedding and head are exchanged while it works, and put back.
        stack: its blocks.
        calls: how each block is called.
        ids: calibration samples [n, S].
        mask: [n, S], 1 where a position counts.
        start: hidden states that enter the first block behind quantised tables, [n, S, H].
        floats: those of the float model.
        tables: quantised values of tables and of whatever lies outside the blocks, by parameter name.
        layers: quantised linears by path.
        vectors: norms and biases inside blocks as they are now, by parameter name; they are tuned.
        fixed: other parameters inside blocks that are no longer the float model's, by parameter name.
        seed: of the order of samples.
        device: where to compute.
        state: where to write down what is half done.
        report: called with the share of the work that is done.
    """

    model: nn.Module
    stack: Stack
    calls: Sequence[BlockCall]
    ids: Tensor
    mask: Tensor
    start: Tensor
    floats: Tensor
    tables: Mapping[str, Tensor]
    layers: Mapping[str, QuantizedLinear]
    vectors: Mapping[str, Tensor]
    fixed: Mapping[str, Tensor]
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    state: FinishState = field(default_factory=lambda: FinishState(None))
    report: Callable[[float], None] = lambda done: None


@dataclass(frozen=True, eq=False)
class FinishResult:
    """What a finish hands back.

    Args:
        layers: quantised linears by path.
        vectors: norms and biases, by parameter name.
        losses: of each window, before and after.
    """

    layers: dict[str, QuantizedLinear]
    vectors: dict[str, Tensor]
    losses: tuple[tuple[float, float], ...]


@dataclass(frozen=True, eq=False)
class Finish:
    """A finish with its settings; made by :func:`load_finish`."""

    name: str
    method: ModuleType
    options: Any

    def to_json(self) -> dict[str, Any]:
        """Name and settings."""
        return {"name": self.name, "settings": dataclasses.asdict(self.options)}


def load_finish(name: str | None, options_of: Callable[[ModuleType], Any]) -> Finish | None:
    """The finish of this name; None for none.

    Args:
        name: a file of ``roundexport/algorithms``.
        options_of: makes a method's Settings.

    Raises:
        UsageError: no such file, or one that does not finish.
    """
    if name is None:
        return None
    method = discovery.load("algorithms", name)
    if not hasattr(method, "finish"):
        raise UsageError(f"{name!r} does not tune a whole model after its blocks; use end_to_end, or none")
    return Finish(name, method, options_of(method))


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


def finish_artifact(
    finish: Finish,
    checkpoint: Checkpoint,
    tuned: Path,
    out: Path,
    samples: Samples,
    device: torch.device,
    report: Callable[[float], None],
) -> tuple[tuple[float, float], ...]:
    """Tune an artifact's model as a whole and write what became of it.

    Args:
        finish: how.
        checkpoint: the float model.
        tuned: the artifact of the blocks.
        out: folder for the finished one, in that of the run's state; what an earlier run left in it is removed.
        samples: calibration samples.
        device: where to compute.
        report: called with the share that is done.

    Returns:
        Losses before and after, per window.
    """
    options, ids = finish.options, samples.ids
    artifact = Artifact.open(tuned, check_hashes=False)
    model = checkpoint.load_model().requires_grad_(False)
    stack = find_stack(model)
    calls = capture_calls(model, stack, ids)
    floats = first_hidden(model, stack, ids, options.batch_size)
    inside = tuple(f"{stack.block_name(index)}." for index in range(len(stack.blocks)))
    overrides = artifact.overrides()
    tables = _outside(artifact, model, inside)
    start = _start(model, tables, lambda: first_hidden(model, stack, ids, options.batch_size))
    eight_bits = artifact.vectors()
    changed = {name: torch.tensor(values) for name, values in overrides.items() if name.startswith(inside)}
    vectors = {
        name: changed.pop(name, parameter.detach().clone())
        for name, parameter in model.named_parameters()
        if name.startswith(inside) and parameter.ndim == 1 and name not in eight_bits
    }
    result = finish.method.finish(
        FinishInputs(
            model, stack, calls, ids, samples.mask, start, floats, tables,
            {name: artifact.linear(name) for name in artifact.names() if name.startswith(inside)},
            vectors, changed, samples.seed, device, FinishState(out.parent), report,
        ),
        options,
    )  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    writer = ArtifactWriter(out, [(artifact.entry(name).info, artifact.entry(name).spec) for name in artifact.names()])
    try:
        for name in artifact.names():
            writer.add(name, result.layers.get(name) or artifact.linear(name))
        for name, values in overrides.items():
            writer.add_override(name, eight_bits.get(name, values))
        for name, tensor in result.vectors.items():
            if name in overrides or not torch.equal(tensor, model.get_parameter(name)):
                writer.add_override(name, tensor.numpy())
        manifest = artifact.manifest
        described = {**finish.to_json(), "losses": [list(pair) for pair in result.losses]}
        settings = {**manifest.algorithm["settings"], "finish": described}
        writer.finish(
            source=manifest.source,
            algorithm={"name": manifest.algorithm["name"], "settings": settings},
            calibration=manifest.calibration,
            kept_float=manifest.kept_float,
            versions=manifest.versions,
            losses={entry.info.name: (entry.loss_before, entry.loss_after) for entry in manifest.layers},
            side_files=checkpoint.copy_side_files(out),
        )
    finally:
        writer.close()
    losses: tuple[tuple[float, float], ...] = result.losses
    return losses


def _outside(artifact: Artifact, model: nn.Module, inside: tuple[str, ...]) -> dict[str, Tensor]:
    """Values of what was quantised or changed outside the blocks, by parameter name; a tied table under each name."""
    found: dict[str, Tensor] = {}
    for name in artifact.names():
        if not name.startswith(inside):
            table = torch.from_numpy(artifact.linear(name).dequantize())
            for owner in (name, *artifact.entry(name).info.shared_with):
                module = model.get_submodule(owner)
                turned = weight_of(module).shape != module.get_parameter("weight").shape
                found[f"{owner}.weight"] = table.t() if turned else table
    for name, values in artifact.overrides().items():
        if not name.startswith(inside):
            found[name] = torch.tensor(values)
    return found


def _start(model: nn.Module, tables: dict[str, Tensor], run: Callable[[], Tensor]) -> Tensor:
    """Hidden states behind the quantised tables, which stand in for the model's own meanwhile."""
    kept = {name: model.get_parameter(name).detach().clone() for name in tables}
    try:
        for name, values in tables.items():
            model.get_parameter(name).data.copy_(values)
        return run()
    finally:
        for name, values in kept.items():
            model.get_parameter(name).data.copy_(values)
