"""What a benchmark of packages in all their engines tells `auto`: a row for each vendor's loop (engine_table.py).

The time of an answer is that from request to last token.  Ratios are taken inside each round, between the two engines
of one package; packages of one target are pooled.

A busy machine gives no rows.  Two runs of the same packages on two cores with six to ten other processes said .96
(.88–.98) and 1.11 (1.01–1.19) of the same loop: intervals tell the scatter of a run, not that runs differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from roundexport import plugins
from roundexport.runtime.engine_table import LEAST_ROUNDS, Measured, is_vendors, versions_of

from .report import BenchReport, Opened, Run, interval


def engine_rows(report: BenchReport) -> list[Measured]:
    """Rows for the machine and the versions of a report; none from a busy machine or fewer than five rounds."""
    machine = report.machine
    if machine["load_1min"] > machine["logical_cores"] / 2:
        return []
    if report.settings.get("properties"):
        return []
    if report.settings["rounds"] < LEAST_ROUNDS or report.settings["precise"] or report.settings["device"] != "CPU":
        return []
    pairs = sorted(_pairs(report.contestants), key=lambda pair: pair[1].info["engine"])
    return [
        row
        for engine, found in groupby(pairs, key=lambda pair: str(pair[1].info["engine"]))
        if (row := _row(report, engine, list(found))) is not None
    ]


def _pairs(contestants: Sequence[Opened]) -> list[tuple[Opened, Opened]]:
    """Each vendor's loop with the engine with sessions that stands before it, of the same package."""
    found, ours = [], None
    for opened in contestants:
        if opened.info["engine"] not in plugins.names("engines"):
            continue
        if not is_vendors(plugins.load("engines", opened.info["engine"])):
            ours = opened
        elif ours is not None and ours.info["package"] == opened.info["package"]:
            found.append((ours, opened))
    return found


def _row(report: BenchReport, engine: str, pairs: Sequence[tuple[Opened, Opened]]) -> Measured | None:
    ratios = [ratio for ours, vendor in pairs for ratio in _ratios(report.runs, ours.name, vendor.name)]
    low, high = interval(ratios)
    if low is None or high is None:
        return None
    ours = pairs[0][0]
    modules = [plugins.load("engines", name) for name in (ours.info["engine"], engine)]
    shapes = sorted({(run.shape["prompt_len"], run.shape["output_len"]) for run in report.runs if _alone(run)})
    lengths, written = ", ".join(str(n) for n, _ in shapes), shapes[0][1]
    on = ", ".join(f"{one.info['package']} ({(one.weight_bytes or 0) / 1e6:.0f} MB)" for one, _ in pairs)
    return Measured(
        target=modules[0].TARGET,
        task="generate",
        batch=1,
        engine=engine,
        ratio=round(float(np.median(ratios)), 4),
        low=round(low, 4),
        high=round(high, 4),
        rounds=len(ratios),
        measured_on=f"{on}, prompts of {lengths}, {written} written, {report.settings['threads']} threads",
        instruction_sets=tuple(report.machine["instruction_sets"]),
        versions=versions_of(*modules),
    )


def _ratios(runs: Sequence[Run], ours: str, vendor: str) -> list[float]:
    """Time with sessions over time in the vendor's loop, of every round and shape."""
    alone = [run for run in runs if _alone(run)]
    base = {(run.round, *run.shape.values()): run.metrics["e2e_ms"] for run in alone if run.contestant == ours}
    found = [run for run in alone if run.contestant == vendor]
    return [base[(run.round, *run.shape.values())] / run.metrics["e2e_ms"] for run in found]


def _alone(run: Run) -> bool:
    """Whether a run answered one prompt."""
    return "output_len" in run.shape and run.shape.get("batch_size", 1) == 1
