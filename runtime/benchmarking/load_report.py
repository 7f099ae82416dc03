"""What a server did under load: one row per demand and contestant, and every request.

    requests, errors, refused   answered whole; failed; told to come again (429), which is an answer and not an error
    output_tps                  tokens that came while measuring / seconds of measuring
    ttft, e2e                   to the first and to the last event, from the moment the request was due
    tpot                        (last − first event) / (tokens − 1), of each request
    itl                         gaps between events, of all requests together
    queue_mean_ms               from arrival to the scheduler's admission, by the server's own count; our server only
    late_max_ms                 by which the client itself sent a request too late, at most: a few milliseconds are fine
    rss_max_mib                 largest resident memory of the server's process tree meanwhile
    joules_per_token            of all sockets while measuring, client included, over those tokens (energy.py)

Percentiles are blank where less than one request (or gap) would lie beyond them, as in `bench`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from .arrivals import Level, Window
from .energy import per_token
from .report import percentile
from .stream_client import BUSY, Sample

if TYPE_CHECKING:
    from rich.table import Table

QUANTILES = (50, 90, 99)
_MIB = 2**20


@dataclass(frozen=True)
class Resources:
    """What a server used during one level.

    Args:
        rss_max: bytes of its process tree, at most; None if its process is not known.
        joules: of all sockets while measuring; None where not readable.
        queue_mean_ms: mean wait for admission; None where the server does not tell.
    """

    rss_max: int | None = None
    joules: float | None = None
    queue_mean_ms: float | None = None


@dataclass(frozen=True)
class Loaded:
    """One level of one contestant.

    Args:
        contestant: its name.
        level: the demand.
        window: what came of it.
        resources: what it took.
    """

    contestant: str
    level: Level
    window: Window
    resources: Resources

    def row(self) -> dict[str, Any]:
        """The figures."""
        window, whole = self.window, [sample for sample in self.window.samples if sample.whole]
        seconds = window.end - window.start
        refused = sum(sample.status == BUSY for sample in window.samples)
        rss = self.resources.rss_max
        row: dict[str, Any] = {
            "contestant": self.contestant,
            "users": self.level.users,
            "rate": self.level.rate,
            "seconds": seconds,
            "requests": len(whole),
            "errors": len(window.samples) - len(whole) - refused,
            "refused": refused,
            "prompt_tokens": median([s.prompt_tokens for s in whole if s.prompt_tokens is not None] or [0]) or None,
            "output_tokens": median([sample.tokens for sample in whole]) if whole else None,
            "requests_per_s": len(whole) / seconds,
            "output_tps": window.output_tokens / seconds,
        }
        row |= _quantiles("ttft", [sample.ttft_ms for sample in whole])
        row |= _quantiles("tpot", [each for sample in whole if (each := sample.tpot_ms) is not None])
        row |= _quantiles("itl", [gap for sample in whole for gap in sample.gaps_ms])
        row |= _quantiles("e2e", [sample.e2e_ms for sample in whole])
        row |= {
            "queue_mean_ms": self.resources.queue_mean_ms,
            "late_max_ms": max((1000 * (sample.sent - sample.due) for sample in window.samples), default=None),
            "rss_max_mib": None if rss is None else rss / _MIB,
            "joules_per_token": per_token(0.0, self.resources.joules, window.output_tokens),
        }
        return row

    def requests(self) -> list[dict[str, Any]]:
        """Every request, times in seconds from the start of measuring."""
        return [_request(sample, self.window.start) for sample in self.window.samples]


@dataclass(frozen=True)
class LoadReport:
    """Everything measured.

    Args:
        machine: `machine_info`, and ``energy``: how it was read, or why not.
        settings: lengths of prompts and answers, seconds, seed.
        contestants: name -> what is known of it.
        levels: in the order taken.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    contestants: dict[str, dict[str, Any]]
    levels: tuple[Loaded, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One row per level and contestant."""
        return [level.row() for level in self.levels]

    def to_json(self) -> dict[str, Any]:
        """Everything as one JSON object."""
        levels = [
            {"contestant": one.contestant, **asdict(one.level), "requests": one.requests()} for one in self.levels
        ]
        return {**self._context(), "rows": self.rows(), "levels": levels}

    def to_jsonl(self) -> str:
        """One line per row, each with machine and settings."""
        lines = ({**row, **self._context(row["contestant"])} for row in self.rows())
        return "".join(json.dumps(line) + "\n" for line in lines)

    def to_csv(self) -> str:
        """One line per row, with the machine in columns of its own."""
        told = {key: json.dumps(v) if isinstance(v, dict | list) else v for key, v in self.machine.items()}
        rows = [{**row, **told, **self.settings} for row in self.rows()]
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    def table(self) -> Table:
        """The rows for reading: a column per level and contestant, as figures are many and levels few."""
        from rich.table import Table

        machine, settings, rows = self.machine, self.settings, self.rows()
        lengths = " and ".join(map(str, settings["prompt_lens"]))
        title = (
            f"{machine['cpu']}, {' '.join(machine['instruction_sets'])}, {settings['threads']} threads per server; "
            f"prompts of {lengths} tokens, {settings['output_len']} written; {settings['duration']:g} s per level; the "
            "client's own time is part of it; latencies from the moment a request was due"
        )
        blank = [] if any(row["joules_per_token"] is not None for row in rows) else [f"energy: {machine['energy']}"]
        table = Table(title=title, title_justify="left", caption="; ".join(blank) or None, caption_justify="left")
        table.add_column("")
        for one in self.levels:
            table.add_column(f"{one.contestant}\n{one.level}", justify="right")
        for name in (name for name in rows[0] if name not in ("contestant", "users", "rate")):
            if any(row[name] is not None for row in rows):
                table.add_row(name.replace("_", " "), *(_cell(row[name]) for row in rows))
        return table

    def _context(self, name: str | None = None) -> dict[str, Any]:
        known = self.contestants if name is None else {name: self.contestants[name]}
        return {"machine": self.machine, "settings": self.settings, "contestants": known}


def _quantiles(name: str, values: Sequence[float]) -> dict[str, Any]:
    return {f"{name}_p{q}_ms": percentile(values, q) for q in QUANTILES} | {f"{name}_n": len(values)}


def _request(sample: Sample, start: float) -> dict[str, Any]:
    first, last = (sample.events[0], sample.events[-1]) if sample.events else (None, None)
    moments = {"due": sample.due, "sent": sample.sent, "first": first, "last": last}
    told = {f"{name}_s": None if moment is None else round(moment - start, 5) for name, moment in moments.items()}
    return {**told, "status": sample.status, "tokens": sample.tokens, "error": sample.error}


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e4 else f"{value:,.0f}"
