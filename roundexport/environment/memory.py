"""``--max-ram``: how much memory a process may hold; work that needs more is refused before it begins, with a figure.

    needed = what the process holds now + the largest of the work's moments
    moment = parts that are held at once, named, in bytes: {"the package, twice while it is opened": 2 · size, …}

Every verb that holds weights asks here, so that all refuse in the same words: what was to be done, what it takes and
why, what may be taken, and what helps.
Estimates are rough, and rather too large: bytes of weights, not of what libraries
keep beside them.  What can be done in pieces does not ask; it takes pieces that fit (hidden_states.py, open_block.py).
Nothing is enforced while the work runs; a control group or ``ulimit`` does that.

Without ``--max-ram``, the limit is that of the process's control groups, as a container has it: what exceeds it would
be killed half-way.  Outside of any, the machine's own memory is no limit, as it may swap, unless who asks says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from roundexport.errors import UsageError, WontFitError

from .control_groups import memory_free, memory_limit

GIB = 2**30
Moment = Mapping[str, float]


@dataclass(frozen=True)
class MemoryLimit:
    """Memory that this process may hold.

    Args:
        gib: so many GiB; None: as much as the control groups allow, or as there is.

    Raises:
        UsageError: not a positive, finite number.
    """

    gib: float | None = None

    def __post_init__(self) -> None:
        if self.gib is None:
            return
        if not math.isfinite(self.gib):
            raise UsageError(f"max_ram must be a finite number, not {self.gib}")
        if not self.gib > 0:
            raise UsageError(f"max_ram must be above 0, not {self.gib}")

    @property
    def bytes(self) -> int | None:
        """In bytes; None: as much as there is."""
        return memory_limit() if self.gib is None else int(self.gib * GIB)

    @property
    def most(self) -> int:
        """In bytes; where there is no limit what the machine has, for work that is done in larger or smaller pieces."""
        total: int = psutil.virtual_memory().total
        return total if self.bytes is None else self.bytes

    def left(self) -> int:
        """Bytes that this process can still take: of the limit, and of what is free."""
        limit, free = self.bytes, memory_free()
        return free if limit is None else max(0, min(free, limit - _held()))

    def fits(self, *moments: Moment) -> bool:
        """Whether this process can hold each of them beside what it holds now."""
        return _held() + max(sum(moment.values()) for moment in moments) <= self.most

    def check(self, work: str, *moments: Moment, advice: str, or_machine: bool = False) -> None:
        """Refuse work that does not fit.

        Args:
            work: what is to be done, as the subject of a sentence.
            moments: what is held at once, at the times when most is.
            advice: what its user can do.
            or_machine: what is larger than the machine's memory is refused, too: the work does not go on as it swaps.

        Raises:
            WontFitError: it takes more than the limit.
        """
        limit, total = self.bytes, psutil.virtual_memory().total
        smaller = or_machine and (limit is None or total < limit)
        if smaller:
            limit = total
        if limit is None:
            return
        held = _held()
        most = max(moments, key=lambda moment: sum(moment.values()))
        needed = held + sum(most.values())
        if needed > limit:
            parts = {**most, "this process so far": held}
            told = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
            allowed = f"control groups give this process {limit / GIB:.2f}, and --max-ram sets another limit"
            if smaller:
                allowed = f"this machine has {limit / GIB:.2f}"
            elif self.gib is not None:
                allowed = f"max_ram is {self.gib:g}"
            raise WontFitError(f"{work} takes about {needed / GIB:.2f} GiB of memory ({told}); {allowed}; {advice}")


def _held() -> int:
    """Bytes that this process holds."""
    held: int = psutil.Process().memory_info().rss
    return held
