"""The table that lm_head reads, rounded for what enters it, where bits are few and the method can.

    8 bits          to nearest, as other tables: an error in a row is small
    4 bits          by the method's `head_rounder`, from sums over some samples through the float model

A head at 4 bits is the most sensitive weight of a small model, and a quarter of what a token reads (decision 0078).
Rounding comes before the blocks, as an embedding that shares the weight changes what enters them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from roundexport.calibration.evenly_spread import enough_tokens
from roundexport.calibration.loss_mask import loss_mask
from roundexport.model.head_inputs import head_gram

if TYPE_CHECKING:
    from roundexport.calibration.samples import Calibration
    from roundexport.quant.quantized_linear import QuantizedLinear
    from roundexport.quant.spec import QuantSpec

    from .job import Job
    from .progress import Progress
    from .table_rounding import Quantize

FEW_BITS = 4  # at most: more are rounded to nearest
_SAMPLES = 32  # of 512 tokens; SmolLM2's head at W4G64: .0614 nats with 16, .0592 with 64


class HeadRounding:
    """Rounds rows of the table; sums are taken when the first are asked for, so that a run that goes on takes none.

    Args:
        job: the run.
        make: the method's `head_rounder`.
        ids: calibration samples [n, S].
        progress: where to report.
    """

    def __init__(self, job: Job, make: Callable[[Tensor, Any], Quantize], ids: Tensor, progress: Progress) -> None:
        self._job, self._make, self._progress = job, make, progress
        self._ids = enough_tokens(ids, _SAMPLES)
        self._rounds: Quantize | None = None

    def __call__(self, weight: Tensor, spec: QuantSpec) -> QuantizedLinear:
        """Rows [n, K] of the table, rounded."""
        if self._rounds is None:
            with self._progress.stage(f"what enters lm_head, on {len(self._ids)} samples") as stage:
                mask = loss_mask(self._job.checkpoint, self._ids)
                sums = head_gram(self._job.weights, self._ids, mask, self._job.batch_size, stage.at)
            self._rounds = self._make(sums, self._job.rounding.settings)
        return self._rounds(weight, spec)


def rounds_head(job: Job) -> bool:
    """Whether the table that lm_head reads is rounded for what enters it, where its bits are few."""
    return job.rounding.method.head_rounder is not None and job.checkpoint.task == "generate"


def head_rounding(job: Job, calibration: Calibration | None, progress: Progress) -> dict[str, Quantize]:
    """What rounds the table that lm_head reads, by its name; nothing where it is rounded as other tables."""
    make = job.rounding.method.head_rounder
    if make is None or calibration is None or not rounds_head(job):
        return {}
    head: Any = job.model.get_output_embeddings()  # type: ignore[operator]
    name = next((name for name, module in job.model.named_modules() if module is head), None)
    return {
        info.name: HeadRounding(job, make, torch.from_numpy(calibration.ids), progress)
        for info, spec in job.plan.layers
        if name in (info.name, *info.shared_with) and spec.bits <= FEW_BITS
    }
