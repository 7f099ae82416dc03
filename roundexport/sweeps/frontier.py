"""What no other package of the same model beats: in size and loss, and in speed and loss where speeds are known.

A package is on a frontier if no other of its model is at least as good in both figures and better in one.  Packages of
different models are not compared: a KL is held against the model's own float form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .running import Row


def frontiers(rows: Sequence[Row], speeds: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row per package, best loss first within each model, for tables and JSON.

    Args:
        rows: what came out of the runs.
        speeds: tokens (or texts) per second by package folder.
    """
    made = []
    for row in rows:
        speed = None if row.package is None else speeds.get(str(row.package))
        own = [other for other in rows if other.about["model"] == row.about["model"] and other.loss is not None]
        small = _unbeaten(row, own, lambda other: other.size)
        timed = [other for other in own if str(other.package) in speeds]
        fast = speed is not None and _unbeaten(row, timed, lambda other: -speeds[str(other.package)])
        made.append(
            {
                **row.about, "target": row.target, "bits per weight": row.bits_per_weight,
                "MiB": None if row.package is None else round(row.size / 2**20, 1), "loss": row.loss, "top-1": row.top1,
                "per second": speed, "frontier": " ".join(["size"] * small + ["speed"] * fast),
                "package": None if row.package is None else str(row.package), "error": row.error,
            }
        )  # fmt: skip
    order = list(dict.fromkeys(row.about["model"] for row in rows))
    return sorted(made, key=lambda row: (order.index(row["model"]), row["loss"] is None, row["loss"] or 0.0))


def _unbeaten(row: Row, others: Sequence[Row], cost: Callable[[Row], float]) -> bool:
    """Whether nobody is at least as good in cost and loss, and better in one."""
    if row.loss is None:
        return False
    own = cost(row), row.loss
    theirs = [(cost(other), other.loss) for other in others if other.loss is not None]
    return not any(size <= own[0] and loss <= own[1] and (size, loss) != own for size, loss in theirs)
