"""Disk that a tuning run will take, said and held against what is free before it begins.

    hidden states   2 files (before and behind a block) · 2 sides · 4 bytes · samples · length · width
    artifact        codes, scales and zero points of the layers that are left
    sums            of a cluster: 13 bytes · K² of the widest inputs, per shard of samples, until they are added up

What an earlier run left is there already and not counted again.  Calibration text and logs are small and left out.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from roundexport.algorithms.interface import BlockSize
from roundexport.algorithms.parts import shards
from roundexport.environment.memory import GIB
from roundexport.errors import WontFitError

if TYPE_CHECKING:
    from collections.abc import Collection

    from .job import Job

_SUMS = 13  # bytes: H packed and C, of samples that are fitted and held out
_SCALE = 5  # bytes of a group's scale and zero point, at most


def check_disk(job: Job, folder: Path, done: Collection[str], shape: tuple[int, int] | None, shared: bool) -> str:
    """Refuse a run that the disk cannot hold.

    Args:
        job: the run.
        folder: where its state is.
        done: layers that an earlier run finished.
        shape: calibration samples and tokens of each; None where no hidden states are kept.
        shared: workers share sums.

    Returns:
        What it takes, in words.

    Raises:
        WontFitError: more than is free.
    """
    left = [(info, spec) for info, spec in job.plan.layers if info.name not in done]
    parts = {
        "the artifact": sum(
            info.out_features * (spec.row_bytes(info.in_features) + _SCALE * spec.groups(info.in_features))
            for info, spec in left
        )
    }
    if shape is not None and left:
        size = BlockSize.of(job.plan.stack.blocks[0], *shape)
        parts["hidden states"] = 16 * size.samples * size.length * size.hidden
        if shared:
            parts["sums"] = _SUMS * size.widest**2 * len(shards(size.samples, job.batch_size))
    there = sum(path.stat().st_size for path in folder.glob("hidden-*.safetensors"))
    needed, free = max(0, sum(parts.values()) - there), shutil.disk_usage(folder).free
    told = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    if needed > free:
        raise WontFitError(
            f"{folder}: the run takes about {needed / GIB:.2f} GiB of disk ({told}), {free / GIB:.2f} GiB are free; "
            "free some, write elsewhere, or use fewer or shorter samples"
        )
    return f"about {needed / GIB:.2f} GiB of disk ({told})"
