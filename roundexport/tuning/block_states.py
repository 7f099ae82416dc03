"""`BlockStates`: hidden states on their way through the blocks, and what a rounding method is given of them.

    before block k    floats      through the float blocks 0 … k-1         [samples, length, H], in a file
                      (hidden_states.py) quantized   through the same blocks as they were rounded
    behind it         floats      = target of the block's rounding         filled before the method runs, or by it
                      quantized   filled after it, with the integers it found

The mask says which positions count in a loss: not padding, nor a decoder's last, whose output predicts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from roundexport.algorithms.interface import BlockInputs
from roundexport.model.block_call import BlockCall, run_all

from .hidden_states import Hidden, drop

if TYPE_CHECKING:
    from .job import Job


@dataclass(eq=False)
class BlockStates:
    """Hidden states between two blocks.

    Args:
        calls: how each block is called.
        mask: [samples, length], positions that count.
        hidden: what enters the next block.
    """

    calls: list[BlockCall]
    mask: Tensor
    hidden: Hidden

    def inputs(
        self, job: Job, block: nn.Module, index: int, after: Hidden, report: Callable[[float], None]
    ) -> BlockInputs:
        """What the rounding method is given for the next block.

        Args:
            job: the run.
            block: the block with its float weights.
            index: the block's.
            after: for the states behind the block; the float ones are filled here, unless the method fills them.
            report: called with the share of the block that is done.
        """
        before = self.hidden
        # A transformation needs the target; and 8-bit norms, which a block gets next, are not the float model's.
        runs = bool(job.plan.block_specs[index])  # where rules keep a block float, no method runs
        fills = (
            runs and getattr(job.method, "COMPUTES_FLOAT_OUTPUTS", False) and not (job.transform or job.plan.vectors)
        )
        if not fills:
            self.take_through(job, block, index, after)

        def reported(share: float) -> None:
            report(share)
            drop(before, after)

        return BlockInputs(
            call=self.calls[index],
            quantized_inputs=before.quantized,
            float_inputs=before.floats,
            target=after.floats,
            mask=self.mask,
            seed=job.settings.seed + index,
            device=job.device,
            report=reported,
            float_outputs_ready=not fills,
            quantized_output_buffer=after.quantized,
            max_bytes=job.max_bytes,
        )

    def take_through(
        self, job: Job, block: nn.Module, index: int, after: Hidden, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Fill the states behind a block: the float ones, or with quantized ``weights`` the quantized ones."""
        before = self.hidden
        source, out = (before.floats, after.floats) if weights is None else (before.quantized, after.quantized)
        call, size = self.calls[index], job.batch_size
        run_all(block, call, source, size, job.device, weights, out, done=lambda: drop(before, after))
