"""A benchmark for reading: one table of speed, one of opening and memory, both within the width of a terminal.

    speed     a row per contestant and shape; a shape that all rows share stands in the title
    opening   a row per contestant: times to open, largest memory, KL

A column that is blank in every row is left out; a figure's least and largest value, or a ratio's interval, stands on
the line below it.  As Markdown both are one table, for a README.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from .report import BenchReport

_SHAPE = ("prompt_len", "output_len", "text_len", "batch_size")
_SPEED = (
    "ttft_ms", "tpot_ms", "prefill_tps", "decode_tps", "decode_tps_ratio", "itl_p99_ms", "latency_ms", "texts_per_s",
    "texts_per_s_ratio", "mbu", "joules_per_token",
)  # fmt: skip
_OPENING = ("cold_load_ms", "load_ms", "first_inference_ms", "peak_rss_mib", "kl")
_SMALL = frozenset({"ttft_ms", "tpot_ms", "decode_tps", "decode_tps_ratio", "texts_per_s", "peak_rss_mib", "kl"})
_RANGES = ("_min", "_max")

Row = dict[str, Any]


def tables(report: BenchReport) -> list[Table]:
    """Both tables, as rich draws them."""
    rows = report.rows()
    machine = report.machine
    shape, shared = _shape(rows)
    title = (
        f"{machine['cpu']}, {' '.join(machine['instruction_sets'])}, {report.settings['threads']} threads, "
        f"reads {machine['read_bandwidth_gbps']} GB/s\n"
        f"medians of {report.settings['rounds']} rounds in turn{shared}"
    )
    speed = _table(rows, ("contestant", *shape, *_filled(rows, _SPEED)), title)
    if "energy" in machine and all(row.get("joules_per_token") is None for row in rows):
        speed.caption, speed.caption_justify = f"no energy: {machine['energy']}", "left"
    opened = list({row["contestant"]: row for row in rows}.values())
    opening = _table(opened, ("contestant", *_filled(opened, _OPENING)), "from the files to the first answer")
    if over := kl_over(opened):
        opening.caption, opening.caption_justify = over, "left"
    return [speed, opening]


def kl_over(rows: Sequence[Row]) -> str:
    """What KLs are over, in words, and whether they can be compared; "" where there are none."""
    over = {row["contestant"]: row["kl_over"] for row in rows if row.get("kl_over")}
    if len(set(over.values())) > 1:
        told = "; ".join(f"{name}: {text}" for name, text in over.items())
        return f"KLs are over different texts and cannot be compared ({told})"
    return f"KL over {next(iter(over.values()))}" if over else ""


def markdown(report: BenchReport) -> str:
    """The figures that matter most as one table in Markdown, and a line on machine and versions below it."""
    rows = report.rows()
    shape, shared = _shape(rows)
    columns = ("contestant", *shape, *(name for name in _filled(rows, _SPEED + _OPENING) if name in _SMALL))
    lines = [[_heading(name) for name in columns], ["---"] + ["--:"] * (len(columns) - 1)]
    lines += [[" ".join(_figure(row, name).split("\n")) for name in columns] for row in rows]
    machine = report.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    about = (
        f"{machine['cpu']}, {' '.join(machine['instruction_sets'])}, {report.settings['threads']} threads; medians of "
        f"{report.settings['rounds']} rounds in turn{shared}; {versions}"
    )
    about += f"; {over}" if (over := kl_over(rows)) else ""
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n<sub>{about}</sub>\n"


def _table(rows: Sequence[Row], columns: Sequence[str], title: str) -> Table:
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0)
    )
    for name in columns:
        left = name == "contestant"
        table.add_column(_heading(name), justify="left" if left else "right", no_wrap=True, vertical="top")
    for row in rows:
        table.add_row(*(_figure(row, name) for name in columns))
    return table


def _shape(rows: Sequence[Row]) -> tuple[list[str], str]:
    """The parts of a shape in which rows differ, and the others in words."""
    parts = [name for name in _SHAPE if name in rows[0]]
    differ = [name for name in parts if len({row[name] for row in rows}) > 1]
    return differ, "".join(f", {_heading(name)} {rows[0][name]}" for name in parts if name not in differ)


def _filled(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    return [name for name in names if any(row.get(name) is not None for row in rows)]


def _heading(name: str) -> str:
    return name.replace("_", " ").replace("mib", "MiB").replace("kl", "KL").replace("mbu", "MBU")


def _figure(row: Row, name: str) -> str:
    """A figure and, on a line below, least and largest of it, or the interval of a ratio."""
    if name == "contestant":
        return "\n  ".join(str(row[name]).split(" · "))
    low, high = (row.get(name + end) for end in _RANGES)
    spread = "" if low is None or high is None or row[name] == low == high else f"\n{cell(low)}–{cell(high)}"
    return cell(row.get(name)) + spread


def cell(value: Any) -> str:
    """A value as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)
