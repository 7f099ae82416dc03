"""``--max-ram``: how much memory a process may hold; work that needs more is refused before it begins, with a figure.

    needed = what the process holds now + the largest of the work's moments
    moment = parts that are held at once, named, in bytes: {"the package, twice while it is opened": 2 · size, …}

Every verb that holds weights asks here, so that all refuse in the same words: what was to be done, what it takes and
why, what may be taken, and what helps.
Estimates are rough, and rather too large: bytes of weights, not of what libraries
keep beside them.  What can be done in pieces does not ask; it takes pieces that fit (hidden_states.py, open_block.py).
Nothing is enforced while the work runs; a control group or ``ulimit`` does that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from roundexport.errors import UsageError, WontFitError

GIB = 2**30
Moment = Mapping[str, float]


@dataclass(frozen=True)
class MemoryLimit:
    """Memory that this process may hold.

    Args:
        gib: so many GiB; None: as much as there is.

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
        """The same in bytes."""
        return None if self.gib is None else int(self.gib * GIB)

    def check(self, work: str, *moments: Moment, advice: str) -> None:
        """Refuse work that does not fit.

        Args:
            work: what is to be done, as the subject of a sentence.
            moments: what is held at once, at the times when most is.
            advice: what its user can do.

        Raises:
            WontFitError: it takes more than the limit.
        """
        if self.gib is None:
            return
        held = psutil.Process().memory_info().rss
        most = max(moments, key=lambda moment: sum(moment.values()))
        needed = (held + sum(most.values())) / GIB
        if needed > self.gib:
            parts = {**most, "this process so far": held}
            told = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
            raise WontFitError(
                f"{work} takes about {needed:.2f} GiB of memory ({told}); max_ram is {self.gib:g}; {advice}"
            )
