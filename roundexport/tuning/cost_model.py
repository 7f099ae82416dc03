"""Estimated time and memory of tuning, before it starts.

    seconds = blocks · (read + forwards · f + roundings · r)
        read        a block's weights from the checkpoint, timed
        f           one sample through the block, timed on a batch
        r           all weights of the block rounded to nearest, timed on some of them
        forwards    Settings.forward_passes(samples) of the methods, and 2 per sample for the hidden states
        roundings   Settings.rtn_equivalents() of the methods: work on weights, independent of tokens; default 1
    memory  = the larger of the process's peak so far and
              its present memory with a block's weights + 4 bytes · Settings.peak_floats(BlockSize)

Mapped hidden states are not counted: their pages are released after every batch (hidden_states.py).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import psutil
import torch
from torch import Tensor, nn

from roundexport.algorithms.interface import BlockSize, MethodSettings
from roundexport.kernels import round_to_nearest
from roundexport.model.block_call import BlockCall
from roundexport.model.blocks import linears, weight_of
from roundexport.progress import duration
from roundexport.quant.spec import QuantSpec

_PROBED_WEIGHTS, _PROBES = 1 << 20, 5  # rounded to time it, so many times
_TABLE_COPIES = 2  # bytes per weight of a table: its codes in parts, and joined


@dataclass(frozen=True)
class Estimate:
    """Seconds that tuning will take, and bytes that the process will hold at most."""

    seconds: float
    bytes: float

    def describe(self, max_ram: float | None = None) -> str:
        """In words, and what helps where it is more than ``max_ram`` GiB."""
        text = f"about {duration(self.seconds)} and {self.bytes / 2**30:.1f} GiB"
        if max_ram is not None and self.bytes > max_ram * 2**30:
            text += f", more than max_ram {max_ram:g}; a smaller batch_size or sample_len takes less"
        return text


@dataclass(frozen=True)
class Work:
    """What a block costs under the methods that run on it.

    Args:
        forward_passes: of one sample through the block.
        rtn_equivalents: work on weights alone, in roundings of all of them to nearest.
        peak_floats: float32 values held at most, besides the block's weights and one batch of hidden states.
    """

    forward_passes: float
    rtn_equivalents: float
    peak_floats: float

    @classmethod
    def of(cls, methods: Sequence[MethodSettings], size: BlockSize, streams: int = 2) -> Work:
        """Of one method's settings after another's, for a block of a size.

        Args:
            methods: settings of each.
            size: of the block, and of what goes through it.
            streams: hidden states that go through every block: the float ones, and the quantized where they are read.
        """
        passes = sum(method.forward_passes(size.samples) for method in methods)
        roundings = sum(method.rtn_equivalents() for method in methods)
        return cls(passes + streams * size.samples, roundings, max(method.peak_floats(size) for method in methods))


def estimate(
    block: nn.Module, work: Work, blocks: int, reading: float, tables: int, batch: tuple[BlockCall, Tensor] | None
) -> Estimate:
    """Time and memory that blocks will take.

    Args:
        block: one of them, with its weights.
        work: what is done to each.
        blocks: their number.
        reading: seconds to read one.
        tables: weights outside the blocks that are still to be rounded.
        batch: how the block is called, and a batch of hidden states [B, S, H] on its device; None: it is not called.
    """
    rounding = rounding_seconds(block)
    weights = sum(weight_of(module).numel() for module in linears(block).values())
    seconds = (reading + rounding) * tables / weights + (reading + work.rtn_equivalents * rounding) * blocks
    if batch is not None:
        call, hidden = batch
        with torch.no_grad():
            call.run(block, hidden)  # the first run pays for thread pools and memory
            once = median(_timed(lambda: call.run(block, hidden)) for _ in range(3)) / len(hidden)
        seconds += once * work.forward_passes * blocks
    held = psutil.Process().memory_info().rss
    return Estimate(seconds, max(peak_bytes(), held + 4 * work.peak_floats, held + _TABLE_COPIES * tables))


def rounding_seconds(block: nn.Module) -> float:
    """Seconds to round all of a block's weights to nearest."""
    matrices = [weight_of(module) for module in linears(block).values()]
    largest = max(matrices, key=lambda matrix: matrix.numel())
    part = largest[: max(1, _PROBED_WEIGHTS // largest.shape[1])]
    spec = QuantSpec(4, None, symmetric=True)
    seconds = min(_timed(lambda: round_to_nearest.run(part, spec)) for _ in range(_PROBES))  # the first pays for memory
    return seconds / part.numel() * sum(matrix.numel() for matrix in matrices)


def peak_bytes() -> int:
    """The most memory that the process has held so far."""
    try:
        import resource
    except ImportError:  # Windows keeps the figure itself; elsewhere what is held now is the best there is
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _timed(work: Callable[[], object]) -> float:
    since = time.monotonic()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()  # else it is the launch that is timed
    return time.monotonic() - since
