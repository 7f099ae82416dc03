"""Rows that compare.py wrote with --json: read, and printed as the Markdown table of docs/measurements.md.

usage: python rows.py ROWS.jsonl          by real bits, so that rows that cost the same stand together
"""

import json
import sys
from pathlib import Path
from typing import Any

HEAD = ("tuner", "scheme", "bits/weight", "KL (nats)", "top-1", "perplexity", "CPU s")


def points(file: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Label -> scheme -> row; of rows with the same label and scheme the last one counts."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["label"], {})[row["scheme"]] = row
    return found


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row as text; llama.cpp's types are schemes of their own."""
    bits, group, kind = row["scheme"].split(",")
    scheme = f"W{bits}{'' if group == 'none' else f'G{group}'} {kind}"
    return (
        row["label"],
        "its own" if row["tuner"] == "llama" else scheme,
        f"{row['bits_per_weight']:.2f}",
        f"{row['kl']:.4f} ± {row['kl_se']:.4f}",
        f"{100 * row['top1']:.1f} %",
        f"{row['perplexity']:.2f}",
        f"{row['cpu_s']:.0f}",
    )


def markdown(file: Path) -> str:
    """All rows, by real bits in steps of a tenth, those that lose most first."""
    rows = [row for schemes in points(file).values() for row in schemes.values()]
    rows.sort(key=lambda row: (round(row["bits_per_weight"], 1), -row["kl"]))
    lines = [HEAD, ("---",) * len(HEAD), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(markdown(Path(sys.argv[1])))
