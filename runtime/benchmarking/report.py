"""What a benchmark found: every single measurement, and one summarized row per contestant and shape.

A row has medians over rounds, the spread of the main figure, and ratios to the first contestant taken inside each round
(median of ratios, not ratio of medians), with a 95 % bootstrap interval from five rounds on.  JSON lines and CSV repeat
machine, versions, threads and precisions in every record, so that a line cut out of its file still says where it comes
from.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .profile import Profile

_RATIOS = ("prefill_tps", "decode_tps", "texts_per_s")  # larger is better
_ROUNDS = 5  # from which a bootstrap interval is told
_SPREAD = ("decode_tps", "texts_per_s")
_OPENED = ("cold_load_ms", "load_ms", "first_inference_ms", "peak_rss_mib", "kl", "kl_over")


@dataclass(frozen=True)
class Opened:
    """A contestant, from loading to its peak memory.

    Args:
        name: as given.
        task: ``generate`` or ``embed``.
        load_ms: from the files to a compiled graph, hashes checked; the files were read shortly before.
        first_inference_ms: first token, or first vectors, of the very first run.
        loaded_rss_mib: resident memory after loading.
        peak_rss_mib: largest resident memory of the process tree.
        weight_bytes: bytes of weights a decode step reads; None if unknown.
        kl: mean KL to the float model in nats, as `verify` found it; None if it has not run.
        kl_over: the text and how much of it that is over; only figures over the same can be compared.
        info: engine, version, device, threads, effective precisions.
        cold_load_ms: the same as ``load_ms`` with the files on the disk alone; None where that was not measured.
    """

    name: str
    task: str
    load_ms: float
    first_inference_ms: float
    loaded_rss_mib: float
    peak_rss_mib: float
    weight_bytes: int | None
    info: dict[str, Any]
    kl: float | None = None
    cold_load_ms: float | None = None
    kl_over: str | None = None


@dataclass(frozen=True)
class Run:
    """One measurement.

    Args:
        contestant: its name.
        round: 1, 2, …
        shape: ``prompt_len`` and ``output_len``, or ``text_len`` and ``batch_size``.
        metrics: figures by name, see bench.py.
        output_sha256: of the tokens (int64) or vectors (float32); empty where a tool tells none.
        step_ms: gaps between tokens.
    """

    contestant: str
    round: int
    shape: dict[str, int]
    metrics: dict[str, float]
    output_sha256: str
    step_ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class BenchReport:
    """Everything measured.

    Args:
        machine: `machine_info`, and ``read_bandwidth_gbps`` (10⁹ bytes per second).
        settings: rounds, seed, threads, device, precise.
        contestants: in the order given; ratios refer to the first.
        runs: single measurements in the order taken.
        profiles: what operators take, where that was asked for; see profiling.py.
        notes: what was asked for beside the times and failed, and why.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    contestants: tuple[Opened, ...]
    runs: tuple[Run, ...]
    profiles: tuple[Profile, ...] = ()
    notes: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """One row per shape and contestant."""
        shapes = list(dict.fromkeys(tuple(run.shape.items()) for run in self.runs))
        return [self._row(dict(shape), opened) for shape in shapes for opened in self.contestants]

    def to_json(self) -> dict[str, Any]:
        """Machine, settings, contestants, rows and runs as one JSON object."""
        return {**asdict(self), "rows": self.rows()}

    def to_jsonl(self) -> str:
        """One line per measurement, each with machine, settings and contestant."""
        opened = {entry.name: asdict(entry) for entry in self.contestants}
        context = {"machine": self.machine, "settings": self.settings}
        lines = ({**asdict(run), "contestant": opened[run.contestant], **context} for run in self.runs)
        return "".join(json.dumps(line) + "\n" for line in lines)

    def to_csv(self) -> str:
        """One line per row, with machine and engine in columns of their own."""
        rows = [{**row, **dict(self._context(row["contestant"]))} for row in self.rows()]
        out = io.StringIO()
        writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    def _row(self, shape: dict[str, int], opened: Opened) -> dict[str, Any]:
        runs = [run for run in self.runs if run.contestant == opened.name and run.shape == shape]
        metrics = runs[0].metrics
        medians = {name: float(np.median([r.metrics[name] for r in runs if name in r.metrics])) for name in metrics}
        row: dict[str, Any] = {"contestant": opened.name, **shape, "n": len(runs), **medians}
        for name in _SPREAD:
            if name in medians:
                row[f"{name}_min"] = min(run.metrics[name] for run in runs)
                row[f"{name}_max"] = max(run.metrics[name] for run in runs)
        if "decode_tps" in medians:
            gaps = [gap for run in runs for gap in run.step_ms]
            row |= {f"itl_p{q}_ms": percentile(gaps, q) for q in (50, 90, 99)}
            row["mbu"] = self._mbu(opened, medians["decode_tps"])
            row.setdefault("joules_per_token", None)
        for name in _RATIOS:
            if name in medians:
                ratios = self._ratios(runs, name)
                row[f"{name}_ratio"] = float(np.median(ratios))
                row[f"{name}_ratio_min"], row[f"{name}_ratio_max"] = interval(ratios)
        row |= {name: getattr(opened, name) for name in _OPENED}
        return row

    def _ratios(self, runs: list[Run], name: str) -> list[float]:
        first = self.contestants[0].name
        base = {(r.round, *r.shape.values()): r.metrics[name] for r in self.runs if r.contestant == first}
        return [run.metrics[name] / base[(run.round, *run.shape.values())] for run in runs]

    def _mbu(self, opened: Opened, decode_tps: float) -> float | None:
        """Share of the read bandwidth; None where the weights are unknown or fit in the last cache twice over."""
        if opened.weight_bytes is None or opened.weight_bytes < 2 * (self.machine["l3_mib"] or 0) * 2**20:
            return None
        return float(opened.weight_bytes * decode_tps / (self.machine["read_bandwidth_gbps"] * 1e9))

    def _context(self, name: str) -> Iterator[tuple[str, Any]]:
        info = next(entry.info for entry in self.contestants if entry.name == name)
        for key, value in {**info, **self.machine, **self.settings}.items():
            yield key, json.dumps(value) if isinstance(value, dict | list) else value


def percentile(values: Sequence[float], q: int) -> float | None:
    """A percentile; None where so few values were taken that less than one of them lies beyond it."""
    return float(np.percentile(values, q)) if len(values) * min(q, 100 - q) >= 100 else None


def interval(ratios: Sequence[float], draws: int = 2000) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of the median of paired ratios; None below five rounds, where it would mean nothing."""
    if len(ratios) < _ROUNDS:
        return None, None
    values = np.asarray(ratios)
    drawn = np.random.default_rng(0).choice(values, (draws, len(values)))
    low, high = np.percentile(np.median(drawn, 1), [2.5, 97.5])
    return float(low), float(high)
