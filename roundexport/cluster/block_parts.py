"""A block's parts done by workers: what the driver hands them, and how a worker has the block open.

    driver    SharedParts.map(function, items) ──▶ run_part(order, function, item)  in a worker ──▶ result
    order     the block's task (tuning/block_task.py), the folder of shared files, and which linears were rounded so far
    worker    opens the model once and a block once; its batches wait inside the block from stage to stage

What a worker has open is a help and never needed: one that begins anew, in the place of one that died, opens the block
from the order, puts the rounded linears into it and runs its batches up to where they are asked for, which gives the
same numbers bit for bit (model/staged_forward.py).  Where the block is not the model's own any more, because a
transform or eight-bit norms changed it, its parameters are shared too.

Hidden states are read from and written to the run's mapped files, each worker in its own samples.  Through a store, a
worker fetches those that enter the block into a file of its own, and what leaves it is shared like everything else and
written by the driver.  A worker that does not see the model's folder fetches the model by the run's URL.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from roundexport.algorithms.common.open_block import OpenBlock
from roundexport.algorithms.parts import Parts, RoundedRows, Shared, row_parts
from roundexport.errors import CheckpointError
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.fetched_folder import is_url
from roundexport.model.staged_forward import Stage, experts_of, find_stages
from roundexport.model.streamed_model import StreamedModel
from roundexport.tuning.block_task import BlockContext, BlockTask, states_of
from roundexport.tuning.hidden_states import Hidden

from .spilling import Place
from .stores import fetch_copy, store_copy

if TYPE_CHECKING:
    from .workers import Workers

Item = TypeVar("Item")
Result = TypeVar("Result")
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, eq=False)
class Order:
    """What a worker must know of the block that it works on; can be pickled.

    Args:
        task: the block's.
        batch_size: samples that go through it at a time.
        place: for shared tensors; its folder's name tells blocks and runs apart.
        source: folder, URL or hub id as the run was given the model.
        states: URL of the hidden states that enter the block, where a worker does not see their file.
        parameters: the block's, where they are not the checkpoint's any more.
        replaced: linears that were rounded so far, stage by stage.
    """

    task: BlockTask
    batch_size: int
    place: Place
    source: str
    states: str | None
    parameters: Shared | None
    replaced: tuple[Shared, ...]


class SharedParts:
    """Parts of a block's work done by workers; a context.

    Args:
        workers: who does them.
        place: for shared tensors, which is this block's alone.
        source: folder, URL or hub id as the run was given the model.
        task: the block's.
        block: the block as it is to be rounded.
        batch_size: samples that go through it at a time.
    """

    def __init__(
        self, workers: Workers, place: Place, source: str, task: BlockTask, block: nn.Module, batch_size: int
    ) -> None:
        self._workers, self._place, self._source = workers, place, source
        self._task, self._block, self._size = task, block, batch_size
        self._states: str | None = None
        self._parameters: Shared | None = None
        self._replaced: list[Shared] = []
        self.stages: Sequence[Stage] = ()

    def __enter__(self) -> Parts:
        self._place.begin()  # without what a run left that was killed
        task, states = self._task, self._task.states
        assert states is not None
        if task.transform is not None or task.vectors:
            self._parameters = self._place.share("parameters", dict(self._block.named_parameters()))
        if self._place.store is not None:
            self._states = store_copy(states.before, self._place.store)
        first = Hidden.open(states.before).floats[:1].to(task.device)
        self.stages = find_stages(self._block, states.call, first)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._place.end()

    def has_experts(self, stage: int) -> bool:
        """See :class:`Parts`."""
        return experts_of(self._block, self.stages[stage]) is not None

    def map(
        self, function: Callable[[Any, Item], Result], items: Sequence[Item], homes: Sequence[int] | None = None
    ) -> Iterator[Result]:
        """See :class:`Parts`."""
        order = Order(
            self._task, self._size, self._place, self._source, self._states, self._parameters, tuple(self._replaced)
        )
        return self._workers.map(functools.partial(run_part, order, function), items, homes)

    def total(self, found: Iterable[tuple[Key, Shared]]) -> dict[Key, dict[str, Tensor]]:
        """See :class:`Parts`; every worker adds some rows, so that no machine reads all sums."""
        by_key: dict[Key, list[Shared]] = {}
        for key, shared in found:
            by_key.setdefault(key, []).append(shared)
        totals: dict[Key, dict[str, Tensor]] = {}
        for key, shared_by in by_key.items():
            own = tuple(shared for shared in shared_by if shared.tensors())
            if own:
                rows = len(next(iter(own[0].tensors().values())))
                pieces = [piece.take() for piece in self.map(added_rows, [(own, part) for part in row_parts(rows)])]
                totals[key] = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
            for shared in shared_by:
                shared.release()
        return totals

    def share(self, tensors: Mapping[str, Tensor]) -> Shared:
        """See :class:`Parts`."""
        return self._place.share("driver", tensors)

    def replace(self, rounded: Mapping[str, RoundedRows]) -> None:
        """See :class:`Parts`; workers learn of it with their next part."""
        tensors: dict[str, Tensor] = {}
        for name, rows in rounded.items():
            own = {"codes": rows.codes, "scale": rows.scale, "zero_point": rows.zero_point}
            tensors |= {f"{name}.{kind}": tensor for kind, tensor in own.items()}
        self._replaced.append(self._place.share("replaced", tensors))


def added_rows(opened: OpenBlock, strip: tuple[tuple[Shared, ...], range]) -> Shared:
    """Some rows of tensors that processes shared, added up in their order; runs in a worker."""
    shared, rows = strip
    total: dict[str, Tensor] = {}
    for one in shared:
        for name, tensor in one.tensors().items():
            part = tensor[rows.start : rows.stop]
            total[name] = total[name].add_(part) if name in total else part.clone()
    return opened.share(total)


def run_part(order: Order, function: Callable[[Any, Item], Result], item: Item) -> Result:
    """Do a part; runs in a worker."""
    return function(_here.open(order), item)


class _Here:
    """What this process has open: one model, and one block of it."""

    def __init__(self) -> None:
        self._model: tuple[object, StreamedModel] | None = None
        self._folder: Path | None = None
        self._opened: OpenBlock | None = None
        self._replaced = 0
        self._closing = ExitStack()

    def open(self, order: Order) -> OpenBlock:
        """The block of an order, as far as it is rounded."""
        if self._opened is None or order.place.folder != self._folder or len(order.replaced) < self._replaced:
            self._closing.close()
            self._opened, self._folder, self._replaced = self._begin(order), order.place.folder, 0
        for replaced in order.replaced[self._replaced :]:
            tensors = replaced.tensors()
            names = sorted({name.rpartition(".")[0] for name in tensors})
            for name in names:
                kinds = (tensors[f"{name}.{kind}"] for kind in ("codes", "scale", "zero_point"))
                self._opened.replace({name: RoundedRows(*kinds)})
            self._replaced += 1
        return self._opened

    def _begin(self, order: Order) -> OpenBlock:
        task = order.task
        assert task.states is not None
        model = self._model_of(task, order.source)
        before, after = self._states_of(order)
        context = BlockContext(model, before, after)
        block = self._closing.enter_context(context.model.block(task.index, task.device))
        if order.parameters is not None:
            changed = order.parameters.tensors()
            with torch.no_grad():
                for name, parameter in block.named_parameters():
                    parameter.copy_(changed[name])
        opened = OpenBlock.of(block, states_of(task, context), order.batch_size)
        self._closing.callback(self._forget)
        self._closing.callback(opened.close)
        opened.share = functools.partial(order.place.share, "worker")
        opened.written, opened.apart = after.sync, order.states is not None
        return opened

    def _states_of(self, order: Order) -> tuple[Hidden, Hidden]:
        """Hidden states before and after the block, in the run's files or in files of this process."""
        states = order.task.states
        assert states is not None
        if order.states is None:
            return Hidden.open(states.before), Hidden.open(states.after)
        with tempfile.TemporaryDirectory(prefix="roundexport-", ignore_cleanup_errors=True) as folder:
            before = Hidden.open(fetch_copy(order.states, Path(folder) / "before"))
            samples, length, hidden = before.floats.shape
            return before, Hidden.create(Path(folder) / "after", (samples, length, hidden), {})  # both stay mapped

    def _forget(self) -> None:
        self._opened = None

    def _model_of(self, task: BlockTask, source: str) -> StreamedModel:
        key = (task.model, task.part, task.bfloat16)
        if self._model is None or self._model[0] != key:
            self._model = key, StreamedModel(self._checkpoint(task, source), bfloat16=task.bfloat16)
        return self._model[1]

    def _checkpoint(self, task: BlockTask, source: str) -> Checkpoint:
        """The model of the run's folder, or, where that is not seen, fetched by its URL."""
        if task.model.exists() or not is_url(source):
            if not task.model.exists():
                raise CheckpointError(
                    f"{task.model} is not there for a worker; every machine of a cluster must see the model under the "
                    "same path, or the run be given its URL"
                )
            return Checkpoint.open(task.model, part=task.part)
        found = Checkpoint.open(source, progress=False, part=task.part)
        if found.folder.name != task.model.name:  # the name is made of what the store says of its files
            raise CheckpointError(
                f"{source} is not what it was when the run began; to begin again remove the run's OUT.partial"
            )
        return found


_here = _Here()  # a worker does one part after the other, and what it has open is what makes the next one cheap
