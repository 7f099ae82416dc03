"""Disk that a tuning run will take, said and held against what is free before it begins.

    hidden states   2 files (before and behind a block) · 2 sides · 4 bytes · samples · length · width
    artifact        codes, scales and zero points of the layers that are left; with a finisher once more, of all
    measured        4 bytes · N · R of every linear: what an error of each output costs (output_fisher.py), until it is
                    there; every block removes its own
    sums            of a cluster: 13 bytes · K² of the widest inputs, per shard of samples, until they are added up

What an earlier run left is there already and not counted again.  Calibration text and logs are small and left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from roundexport.algorithms.interface import BlockSize
from roundexport.algorithms.parts import shards
from roundexport.environment.disk import check_disk

from .output_fisher import rows_of, values

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from roundexport.quant.spec import LinearInfo, QuantSpec

    from .checkpointing import TuneState
    from .job import Job
    from .planned_run import PlannedRun

_SUMS = 13  # bytes: H packed and C, of samples that are fitted and held out
_SCALE = 5  # bytes of a group's scale and zero point, at most


def check_run(job: Job, state: TuneState, shape: tuple[int, int] | None, shared: bool) -> str:
    """Refuse a run that the disk cannot hold.

    Args:
        job: the run.
        state: what an earlier run did.
        shape: calibration samples and tokens of each; None where no hidden states are kept.
        shared: workers share sums.

    Returns:
        What it takes, in words.

    Raises:
        WontFitError: more than is free.
    """
    left = [(info, spec) for info, spec in job.plan.layers if info.name not in state.layers_done]
    parts: dict[str, float] = {"the artifact": _artifact_bytes(left)}
    if shape is not None and left:
        size = BlockSize.of(job.plan.stack.blocks[0], *shape)
        parts["hidden states"] = 16 * size.samples * size.length * size.hidden
        if shared:
            parts["sums"] = _SUMS * size.widest**2 * len(shards(size.samples, job.batch_size))
    measures = job.fisher_samples > 0 and not state.fisher_measured
    if measures:
        parts["what errors of outputs cost"] = output_bytes(rows_of(job.plan))
    if job.finisher is not None:
        parts["the artifact that is finished"] = _artifact_bytes(job.plan.layers)
    advice = "free some, write elsewhere, or use fewer or shorter samples"
    advice += "; --recipe default measures no outputs" if measures else ""
    kinds = ["hidden", *(["fisher"] if measures else [])]
    there = sum(path.stat().st_size for kind in kinds for path in state.folder.glob(f"{kind}-*.safetensors"))
    return check_disk(state.folder, "the run", parts, advice, there)


def planned_output_bytes(run: PlannedRun) -> int:
    """Of what an error of each output costs, before there is a run; 0 where its method does not look at that."""
    return output_bytes(rows_of(run.plan)) if run.fisher_samples else 0


def output_bytes(rows: Mapping[str, int]) -> int:
    """Of what an error of each output costs, for linears with so many rows."""
    return 4 * sum(map(values, rows.values()))


def _artifact_bytes(layers: Iterable[tuple[LinearInfo, QuantSpec]]) -> int:
    return sum(
        info.out_features * (spec.row_bytes(info.in_features) + _SCALE * spec.groups(info.in_features))
        for info, spec in layers
    )
