"""What the float model says about tokens, with one block of it in memory at a time, and remembered for the next time.

    all windows begin their forward and wait before block 0
    for every block:  its weights are read, every window's forward goes on through it, its weights are dropped
    behind the last:  hidden states go to their place in [n, S, H], and the forward that had them is let go; norm and
                      lm_head make logits of them, some rows at a time

A forward is the model's own code in a greenlet, which stops before every block, so nothing about the model is assumed
but that its blocks run in order, each once.  Where they do not, and where weights cannot be read by name
(streamed_model.py), the model is loaded whole.  Both ways give the same hidden states.

Log-probabilities of 8,192 tokens over a vocabulary of 49,152 take 1.6 GB as they are.  The hidden states before the
final norm decide them, take 19 MB and lose nothing, so those are what is cached (float32, under the model's digest, the
ids' and the versions of torch and transformers); a second run costs the lm_head's product and no block.
In memory: one block, lm_head and the rows of the embedding that occur, all hidden states once; while blocks run,
`STATES_BYTES` of them at most beside those that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import greenlet
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from roundexport.calibration.samples import ids_digest
from roundexport.errors import UnsupportedError
from roundexport.model.block_call import without_cache
from roundexport.model.blocks import Stack
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.output_head import output_of
from roundexport.model.streamed_model import StreamedModel
from roundexport.progress import Progress
from roundexport.storage.tensor_cache import TensorCache, key_of

Ids = NDArray[np.int64]
Report = Callable[[float, str], None]

STATES_BYTES = 1 << 30
"""Hidden states that go through the blocks together; more windows take more rounds."""
_LOGITS_BYTES = 32 << 20  # logits at a time: small enough to stay in a processor's cache for the most part
_BATCH_TOKENS = 1024
_VERSION = 1  # of what is cached
CACHE = TensorCache("float-states")


class FloatModel:
    """A float model that is asked about tokens.

    Args:
        checkpoint: the model, a decoder.
        shown: where progress is reported.
        cache: where answers are remembered; None: nowhere.
    """

    def __init__(
        self, checkpoint: Checkpoint, shown: Progress | None = None, cache: TensorCache | None = CACHE
    ) -> None:
        self._checkpoint, self._cache = checkpoint, cache
        self._shown = shown or Progress(enabled=False)
        self._weights: StreamedModel | None = None

    @property
    def weights(self) -> StreamedModel:
        """The model's skeleton, or the model."""
        if self._weights is None:
            self._weights = StreamedModel(self._checkpoint)
        return self._weights

    def states(self, *windows: Ids) -> list[States]:
        """What leaves the last block for windows of tokens; all that is not remembered in one walk over the blocks.

        Args:
            windows: ids [n, S], each of a length of its own.
        """
        keys = [self._key(ids) for ids in windows]
        if self._cache is None:
            return self._states(keys, windows)
        with self._cache.alone(keys[0], self._waiting):  # the text, which others ask for too
            return self._states(keys, windows)

    def _waiting(self) -> AbstractContextManager[object]:
        return self._shown.stage("waiting for another run's float model")

    def _states(self, keys: Sequence[str], windows: Sequence[Ids]) -> list[States]:
        found = [None if self._cache is None else self._cache.get(key) for key in keys]
        missing = [index for index, entry in enumerate(found) if entry is None]
        if missing:
            tokens = sum(windows[index].size for index in missing)
            with self._shown.stage(f"scoring {tokens} tokens with the float model") as stage:
                computed = self._compute([windows[index] for index in missing], stage.at)
            for index, entry in zip(missing, computed, strict=True):
                found[index] = entry
                if self._cache is not None:
                    kept = {"hidden": ("F32", entry["hidden"]), "beside": ("I64", entry["beside"])}
                    self._cache.put(keys[index], kept)
        return [
            States(ids, torch.from_numpy(entry["hidden"]), int(entry["beside"]))
            for ids, entry in zip(windows, found, strict=True)
            if entry is not None
        ]

    @contextmanager
    def logits_of(self, states: States) -> Iterator[LogitsOf]:
        """While it lasts, logits of any part of some states; lm_head is in memory."""
        weights = self.weights
        rest = None if states.beside < 0 else (None,) * states.beside
        with (
            torch.no_grad(),
            weights.tables(torch.from_numpy(states.ids)),
            output_of(weights.model, weights.stack, rest) as head,
        ):
            yield LogitsOf(states, lambda hidden, ids: head(hidden, ids, {}))

    def _key(self, ids: Ids) -> str:
        return key_of(
            version=_VERSION, model=self._checkpoint.digest, ids=ids_digest(ids), shape=list(ids.shape),
            torch=torch.__version__, transformers=transformers.__version__,
        )  # fmt: skip

    def _compute(self, windows: Sequence[Ids], report: Report) -> list[dict[str, NDArray[Any]]]:
        kept = [_Kept(len(ids)) for ids in windows]
        batches = [
            _Batch(torch.from_numpy(part), own, start)
            for ids, own in zip(windows, kept, strict=True)
            for start, part in _parts(ids)
        ]
        try:
            _last_hidden(self.weights, batches, report)
        except UnsupportedError:
            if not self.weights.streamed:
                raise
            self._shown.say("the float model's blocks cannot be taken one at a time; it is loaded whole")
            self._weights = StreamedModel(self._checkpoint, whole=True)
            _last_hidden(self.weights, batches, report)
        return [{"hidden": own.hidden.numpy(), "beside": np.array(own.beside)} for own in kept]


class States:
    """What leaves a decoder's last block.

    Args:
        ids: token ids [n, S].
        hidden: float32 [n, S, H].
        beside: how many values the block returns beside it; -1 where it returns a tensor.
    """

    def __init__(self, ids: Ids, hidden: Tensor, beside: int) -> None:
        self.ids, self.hidden, self.beside = ids, hidden, beside


class LogitsOf:
    """Logits of parts of some states; made by :meth:`FloatModel.logits_of`.

    Attributes:
        vocabulary: how many logits a position has.
    """

    def __init__(self, states: States, head: Any) -> None:
        self._states, self._head = states, head
        self.vocabulary = int(self._logits(0, slice(0, 1)).shape[-1])

    def of_window(self, index: int, first: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Positions of a window from ``first`` on and the logits [rows, V] there, in order."""
        length, rows = self._states.ids.shape[1], max(1, _LOGITS_BYTES // (4 * self.vocabulary))
        for start in range(first, length, rows):
            part = slice(start, min(start + rows, length))
            yield part, self._logits(index, part)

    def _logits(self, index: int, part: slice) -> Tensor:
        hidden = self._states.hidden[index : index + 1, part]
        found: Tensor = self._head(hidden, torch.from_numpy(self._states.ids[index : index + 1, part]))[0]
        return found


class _Kept:
    """What leaves the last block for windows of one length.

    Args:
        count: windows.

    Attributes:
        hidden: [count, S, H], there once the first batch has come.
        beside: how many values the block returns beside it; -1 where it returns a tensor.
    """

    hidden: Tensor
    beside: int

    def __init__(self, count: int) -> None:
        self._count, self._begun = count, False

    def take(self, start: int, output: Any) -> None:
        """Keep what the block returned for the windows from ``start`` on."""
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor):
            raise UnsupportedError("the last block returns no hidden states")
        if not self._begun:
            self.hidden, self._begun = first.new_empty((self._count, *first.shape[1:])), True
            self.beside = len(output) - 1 if isinstance(output, tuple) else -1
        self.hidden[start : start + len(first)] = first


@dataclass(frozen=True, eq=False)
class _Batch:
    """Windows that go through the model together: their ids, and where what comes out goes."""

    ids: Tensor
    kept: _Kept
    start: int


def _parts(ids: Ids) -> Iterator[tuple[int, Ids]]:
    """Windows in batches of about `_BATCH_TOKENS`, each with the number of its first."""
    size = max(1, _BATCH_TOKENS // ids.shape[1])
    for start in range(0, len(ids), size):
        yield start, np.ascontiguousarray(ids[start : start + size])


def _last_hidden(weights: StreamedModel, batches: list[_Batch], report: Report) -> None:
    """Keep what leaves the last block, and how many values it returns beside that."""
    width, done = weights.model.config.get_text_config().hidden_size, 0  # type: ignore[union-attr, operator]
    for group in _rounds(batches, int(width)):
        distinct: Tensor = torch.cat([batch.ids.flatten() for batch in group]).unique()  # type: ignore[no-untyped-call]
        rows = weights.token_rows(distinct)
        with weights.embedding(distinct, rows), _paused(weights.stack):
            runs = [_Forward(weights.model, batch) for batch in group]
            try:
                _walk(weights, runs, _Within(report, done / len(batches), len(group) / len(batches)).at)
            finally:
                for run in runs:
                    run.cancel()
        done += len(group)


def _rounds(batches: list[_Batch], width: int) -> Iterator[list[_Batch]]:
    most, group = STATES_BYTES // (4 * width), list[_Batch]()
    for batch in batches:
        if group and sum(other.ids.numel() for other in group) + batch.ids.numel() > most:
            yield group
            group = []
        group.append(batch)
    yield group


def _walk(weights: StreamedModel, runs: list[_Forward], report: Report) -> None:
    stack = weights.stack
    for run in runs:
        run.advance(0)
    for index in range(len(stack.blocks)):
        with weights.block(index):
            for number, run in enumerate(runs):
                run.advance(index + 1)
                share = (index + (number + 1) / len(runs)) / len(stack.blocks)
                report(share, stack.block_name(index))
                if index + 1 == len(stack.blocks):
                    run.cancel()  # what left the block is kept


@contextmanager
def _paused(stack: Stack) -> Iterator[None]:
    """While it lasts, a :class:`_Forward` waits before every block, and ends behind the last."""
    handles = []
    for index, block in enumerate(stack.blocks):
        handles.append(block.register_forward_pre_hook(lambda *_, index=index: _arrived(index)))
    last = len(stack.blocks)
    handles.append(stack.blocks[-1].register_forward_hook(lambda _, __, output: _ended(last, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _arrived(index: int) -> None:
    run = greenlet.getcurrent()
    if isinstance(run, _Forward):
        run.parent.switch(index)


def _ended(index: int, output: Any) -> None:
    run = greenlet.getcurrent()
    if not isinstance(run, _Forward):
        return
    run.batch.kept.take(run.batch.start, output)
    run.parent.switch(index)


class _Within:
    """Reports a share of a part of the work as a share of all of it."""

    def __init__(self, report: Report, begun: float, part: float) -> None:
        self._report, self._begun, self._part = report, begun, part

    def at(self, share: float, detail: str) -> None:
        """So much of the part is done."""
        self._report(self._begun + share * self._part, detail)


class _Forward(greenlet.greenlet):  # type: ignore[misc]
    """The forward of one batch through the model's own code."""

    def __init__(self, model: nn.Module, batch: _Batch) -> None:
        super().__init__(lambda: model(input_ids=batch.ids, **without_cache(model)))
        self.batch = batch

    def advance(self, index: int) -> None:
        """Run until the block of this index is next; the number of blocks: until the last has run."""
        self.parent = greenlet.getcurrent()
        with torch.no_grad():  # out here, as all batches share the thread's mode and end in any order
            reached = self.switch()
        if reached != index:
            raise UnsupportedError(f"the model's blocks do not run in order: {reached} came where {index} was next")

    def cancel(self) -> None:
        """Give up, freeing what the forward holds."""
        if self and not self.dead:
            self.throw()
