"""A block as a process has it open, and parts of its work done by that process, one after the other.

In: the float block and what it is tuned on.  Out: what functions of parts get, and the plain way to call them.  Whether
all samples can wait inside the block at once is decided here, from the memory that is left; the result is the same
either way (model/staged_forward.py).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor, nn

from roundexport.algorithms.interface import BlockInputs, BlockSize
from roundexport.algorithms.parts import Held, Parts, RoundedRows, Shared, added
from roundexport.environment.control_groups import memory_free
from roundexport.model.staged_forward import Stage, StagedForward

_SQUARES = 5  # matrices of K × K: H and C of samples that are fitted and held out, and one to try a damping
Item = TypeVar("Item")
Result = TypeVar("Result")
Key = TypeVar("Key", bound=Hashable)


@dataclass(eq=False)
class OpenBlock:
    """What a function of a part works on.

    Args:
        block: the float block.
        inputs: hidden states.
        walk: the block on both sides, samples waiting in it.
        share: lets others look at tensors.
        written: called when hidden states that leave the block were written.
        apart: whoever asks does not see where hidden states are written; they are shared with it instead.
        kept: what functions keep for each other in this process.
    """

    block: nn.Module
    inputs: BlockInputs
    walk: StagedForward
    share: Callable[[Mapping[str, Tensor]], Shared] = Held
    written: Callable[[], None] = lambda: None
    apart: bool = False
    kept: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, block: nn.Module, inputs: BlockInputs, batch_size: int) -> OpenBlock:
        """Of a block and its hidden states; to be closed."""
        walk = StagedForward(
            block,
            inputs.call,
            inputs.quantized_inputs,
            inputs.float_inputs,
            batch_size,
            inputs.device,
            _fits(inputs, block),
        )
        return cls(block, inputs, walk)

    def replace(self, rounded: Mapping[str, RoundedRows]) -> None:
        """Go on with rounded weights."""
        for name, rows in rounded.items():
            self.walk.replace(name, rows.weight())

    def close(self) -> None:
        """Free what waits."""
        self.kept.clear()
        self.walk.close()


class LocalParts:
    """Parts of a block's work done in this process; a context.

    Args:
        block: the float block, not changed.
        inputs: hidden states.
        batch_size: samples that go through the block at a time.
    """

    def __init__(self, block: nn.Module, inputs: BlockInputs, batch_size: int) -> None:
        self._opened = OpenBlock.of(block, inputs, batch_size)

    def __enter__(self) -> Parts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    @property
    def stages(self) -> Sequence[Stage]:
        """See :class:`Parts`."""
        return self._opened.walk.stages

    def has_experts(self, stage: int) -> bool:
        """See :class:`Parts`."""
        return self._opened.walk.experts(stage) is not None

    def map(
        self, function: Callable[[Any, Item], Result], items: Sequence[Item], homes: Sequence[int] | None = None
    ) -> Iterator[Result]:
        """See :class:`Parts`; an item is taken up when its result is asked for."""
        del homes
        for item in items:
            yield function(self._opened, item)

    def total(self, found: Iterable[tuple[Key, Shared]]) -> dict[Key, dict[str, Tensor]]:
        """See :class:`Parts`."""
        return added(found)

    def share(self, tensors: Mapping[str, Tensor]) -> Shared:
        """See :class:`Parts`."""
        return self._opened.share(tensors)

    def replace(self, rounded: Mapping[str, RoundedRows]) -> None:
        """See :class:`Parts`."""
        self._opened.replace(rounded)


def waiting(size: BlockSize) -> float:
    """Float32 values that all samples hold while they wait, on both sides: residual and its part, norm, two inputs."""
    return 2.0 * size.samples * size.length * (3 * size.hidden + 2 * size.widest)


def beside(size: BlockSize) -> float:
    """Float32 values that are held beside the block and what waits in it: the block that is quantized, and matrices."""
    return float(size.weights + _SQUARES * size.widest**2)


def _fits(inputs: BlockInputs, block: nn.Module) -> bool:
    """Whether all samples can wait inside the block at once."""
    samples, length, _ = inputs.float_inputs.shape
    size = BlockSize.of(block, samples, length)
    needed = 4 * (waiting(size) + beside(size))
    # Without a limit, half of what is left; the result is the same either way.
    if inputs.device.type != "cpu":
        free: int = torch.accelerator.get_memory_info(inputs.device)[0]
        return needed < free // 2
    held: int = psutil.Process().memory_info().rss
    limit: int = inputs.max_bytes or held + memory_free() // 2
    return held + needed < limit
