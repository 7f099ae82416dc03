"""Two conventions for zero points in files of GPTQ's layout, told apart by the numbers themselves.

    v1 (`checkpoint_format` gptq, auto_round:auto_gptq)    stored = zero_point - 1
    v2 (`checkpoint_format` gptq_v2, auto_round)           stored = zero_point

A file that is read by the wrong one is off by one scale in every weight, which no shape shows.  Two things show it:

    symmetric     the zero point is 2^(bits-1), so one of the two readings has it everywhere
    asymmetric    weights have a mean near zero, so mean(code - zero_point), in steps of the grid, is near 0 in one
                  reading and near ±1 in the other; over all of a layer it scatters by well below 0.1

At 8 bits a step is too small for that: the mean of a layer's weights is itself some steps away from 0.  So what the
config says counts, unless the numbers contradict it; then the checkpoint is refused, as no reader can know which of
the two is wrong.  Where the config says nothing v1 is meant, and where the numbers say nothing either it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import CheckpointError

WORDS = {1: "stored one too low (v1)", 0: "stored as they are (v2)"}
_TELLING_BITS = 4  # up to it a step is large against the mean of a layer's weights
_MOST = 8  # layers whose codes are read
_CLEAR = 0.35  # steps: a mean below it speaks for a reading, one beyond 1 - it against


@dataclass(frozen=True, eq=False)
class Reading:
    """Zero points of a layer as the config says they are to be read, and what its codes would say.

    Args:
        bits: of a code.
        zero: zero points [G, N].
        mean_code: reads all codes and gives their mean.
    """

    bits: int
    zero: NDArray[np.uint8]
    mean_code: Callable[[], float]


@dataclass(frozen=True)
class Evidence:
    """What the numbers of some layers say about the reading they were read by.

    Args:
        offset: mean of code - zero_point over all weights of a layer, the median over layers; None where no layer is
            fine enough to say, as at 8 bits, or where nobody needs it.
        symmetric: zero points are the midpoint (0), one below (-1) or one above it (+1) everywhere; None: neither.
    """

    offset: float | None
    symmetric: int | None


def gather(layers: Sequence[Reading]) -> Evidence:
    """Look at layers: at the zero points of all, and unless these settle it at the codes of eight, evenly chosen."""
    apart: set[int] = set()
    for layer in layers:
        apart.update((np.unique(layer.zero).astype(np.int64) - (1 << (layer.bits - 1))).tolist())
    same = next(iter(apart)) if apart in ({-1}, {0}, {1}) else None
    telling = [layer for layer in layers if layer.bits <= _TELLING_BITS]
    if same == 0 or not telling:
        return Evidence(None, same)
    chosen = telling[:: -(-len(telling) // _MOST)]
    offsets = [layer.mean_code() - float(layer.zero.mean(dtype=np.float64)) for layer in chosen]
    return Evidence(float(np.median(offsets)), same)


def check_convention(evidence: Evidence, symmetric: bool, shift: int, explicit: bool, where: str) -> None:
    """Hold the reading that the config asks for against the numbers.

    Args:
        evidence: of layers that were read as the config says.
        symmetric: the config says that the zero point is the midpoint.
        shift: what was added to the stored zero points: 1 in v1, 0 in v2.
        explicit: the config names the convention; else v1 is what loaders assume.
        where: the checkpoint.

    Raises:
        CheckpointError: the numbers say that the other convention holds, or neither.
    """
    said, other = WORDS[shift], WORDS[1 - shift]
    wrong = 1 - 2 * shift  # offset of the codes where the other convention holds
    offset = evidence.offset
    if evidence.symmetric == 0 or (not symmetric and offset is not None and abs(offset) <= _CLEAR):
        return
    off = "" if offset is None else f": read so, weights are off by {offset:+.2f} steps of their grid on average"
    if evidence.symmetric == -wrong or (not symmetric and offset is not None and abs(offset - wrong) <= _CLEAR):
        raise CheckpointError(
            f"{where}: config.json says that zero points are {said}, the numbers say {other}{off}. Correct "
            "checkpoint_format in its quantization_config, or ask who made it; a loader that believes it shifts every "
            "weight by one step"
        )
    if symmetric:
        raise CheckpointError(
            f"{where}: quantization_config says sym, but the zero points are not the middle of the grid, whether they "
            f"are {said} or {other}; `sym` should be false, or the file is damaged"
        )
    if offset is None and explicit:
        return
    raise CheckpointError(
        f"{where}: whether zero points are {said} or {other} cannot be told{off}. Name checkpoint_format (gptq or "
        "gptq_v2) in quantization_config if you know it, or start from the float model: roundexport tune"
    )
