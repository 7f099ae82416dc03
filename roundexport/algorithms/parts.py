"""A block's work in parts of fixed size, so that the bytes of the result do not depend on who does which part.

    samples   in shards of 16 (whole batches), or in 16 shards where there are more than 256 samples:
              forwards and Gram sums, which are added shard by shard, in order
    rows      of a weight, in parts of 512 at most: grids, codes, scales; a row does not look at the others, or,
              where it does, parts of 2048
    experts   one by one

A method says what is to be done with a part as a function of the block as a process has it open (OpenBlock,
common/open_block.py) and of an item, and takes the results in the order of the items from :meth:`Parts.map`.  By itself
a process does one part after the other (LocalParts); a cluster hands function and item to its workers (cluster/), so
both are of kinds that can be pickled.  Large tensors do not travel with them: whoever has them shares them
(:meth:`Parts.share`), which is nothing inside a process and a file between processes.

Floating-point sums depend on their order.  It is the same for any number of workers because the parts are the same and
because one process adds them up in order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from roundexport.model.torch_threads import ALIGNED_ROWS

if TYPE_CHECKING:
    from roundexport.model.staged_forward import Stage

_SHARD, _SHARDS = 16, 16  # least samples of a shard, and most shards: each has sums that somebody must add
_ROWS = 512
MOST_FISHER_ROWS = 2048  # of a weight, that may know of each other: 16 MiB of S

Item = TypeVar("Item")
Result = TypeVar("Result")
Key = TypeVar("Key", bound=Hashable)


class Shared(Protocol):
    """Tensors that whoever does a part can look at."""

    def tensors(self) -> Mapping[str, Tensor]:
        """By name; not to be changed."""

    def take(self) -> dict[str, Tensor]:
        """By name, to be changed; nobody else will look at them again."""

    def release(self) -> None:
        """Nobody will look at them again."""


class Parts(Protocol):
    """Who does the parts of a block's work."""

    @property
    def stages(self) -> Sequence[Stage]:
        """Groups of linears that share an input, in order."""

    def has_experts(self, stage: int) -> bool:
        """Whether a stage is that of a layer's experts."""

    def map(
        self, function: Callable[[Any, Item], Result], items: Sequence[Item], homes: Sequence[int] | None = None
    ) -> Iterator[Result]:
        """What a function gives for the open block and each item, in the order of the items.

        Args:
            function: of a module, to be found there by its name.
            items: what each part is.
            homes: a number per item; those with the same number are best done in one place, as what waits there is of
                use; None: it does not matter.
        """

    def total(self, found: Iterable[tuple[Key, Shared]]) -> dict[Key, dict[str, Tensor]]:
        """Tensors of the same key and name added up, in their order; keys without tensors are left out."""

    def share(self, tensors: Mapping[str, Tensor]) -> Shared:
        """Let functions look at tensors."""

    def replace(self, rounded: Mapping[str, RoundedRows]) -> None:
        """Go on with rounded weights in place of the linears' own, by name in the block, wherever the block is open."""


@dataclass(frozen=True, eq=False)
class RoundedRows:
    """Rows of a rounded weight.

    Args:
        codes: uint8 [n, K].
        scale: stored values, float32 [n, G].
        zero_point: whole numbers, float32 [n, G].
        target: the weight that was aimed at, float32 [n, K]; None where nobody asked for it.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    target: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[RoundedRows]) -> RoundedRows:
        """All rows, from parts in order."""
        if len(parts) == 1:
            return parts[0]
        targets = [part.target for part in parts if part.target is not None]
        return cls(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat([part.zero_point for part in parts]),
            torch.cat(targets) if targets else None,
        )

    def centered_codes(self) -> Tensor:
        """Code - z, float32 [n, K]."""
        rows, groups = self.scale.shape
        return (self.codes.float().view(rows, groups, -1) - self.zero_point[..., None]).view(rows, -1)

    def weight(self) -> Tensor:
        """ŵ, float32 [n, K]."""
        rows, groups = self.scale.shape
        return (self.centered_codes().view(rows, groups, -1) * self.scale[..., None]).view(rows, -1)


class Held:
    """Shared tensors inside one process: the very tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors themselves."""
        return self._tensors

    def take(self) -> dict[str, Tensor]:
        """The tensors themselves, for good."""
        taken, self._tensors = self._tensors, {}
        return taken

    def release(self) -> None:
        """Let go of them."""
        self._tensors = {}


def added(found: Iterable[tuple[Key, Shared]]) -> dict[Key, dict[str, Tensor]]:
    """See :meth:`Parts.total`: one after the other as they come, so that no more than two are held."""
    totals: dict[Key, dict[str, Tensor]] = {}
    for key, shared in found:
        if not totals.get(key):
            totals[key] = shared.take()
            continue
        for name, tensor in shared.tensors().items():
            totals[key][name].add_(tensor)
        shared.release()
    return {key: total for key, total in totals.items() if total}


def shards(samples: int, batch_size: int) -> list[range]:
    """Numbers of samples, shard by shard, in whole batches."""
    step = -(-max(_SHARD, -(-samples // _SHARDS)) // batch_size) * batch_size
    return [range(start, min(start + step, samples)) for start in range(0, samples, step)]


def row_parts(rows: int) -> list[range]:
    """Rows of a weight in equal parts, as few as their limit allows."""
    return _equal(rows, _ROWS)


def fisher_parts(rows: int) -> list[range]:
    """The same where rows look at each other (kernels/two_sided.py): larger parts."""
    return _equal(rows, MOST_FISHER_ROWS)


def _equal(rows: int, most: int) -> list[range]:
    count = -(-rows // most)
    step = -(-rows // count // ALIGNED_ROWS) * ALIGNED_ROWS
    return [range(start, min(start + step, rows)) for start in range(0, rows, step)]
