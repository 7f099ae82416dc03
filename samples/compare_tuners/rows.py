"""Rows that compare.py wrote with --json: read, and printed as the Markdown table of docs/measurements.md.

usage: python rows.py ROWS.jsonl          by real bits, so that rows that cost the same stand together

record.jsonl holds the rows of the table of record.  A new row is added at its end and takes the place of an earlier one
of the same label, scheme and `when`.  A row of ours that code of another day gave keeps its place with a `when`, as in
"before", that the table prints.  A figure that a row lacks (compare.py without --chat) is a dash.
"""

import json
import sys
from pathlib import Path
from typing import Any

HEAD = (
    "tuner", "scheme", "bits/weight", "KL (nats)", "top-1", "perplexity", "chat: first sentences", "tokens", "CPU s",
    "peak GiB",
)  # fmt: skip
PROJECTS = {"auto-round": "auto-round", "nncf": "NNCF", "gptq": "GPTQModel", "hqq": "HQQ", "llama": "llama.cpp"}


def points(file: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Label, and when -> scheme -> row; of rows with the same label, time and scheme the last one counts."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(f"{row['label']} {row.get('when', '')}".rstrip(), {})[row["scheme"]] = row
    return found


def who(row: dict[str, Any]) -> str:
    """The contestant: ours by its label, another project's tool by its name, version and settings."""
    if row["tuner"] == "ours":
        if "when" in row:
            return f"ours, `{row['label']}` ({row['when']})"
        return "round-to-nearest" if row["label"] == "rtn" else f"**ours, `{row['label']}`**"
    version = f"-python {row['version']}" if row["tuner"] == "llama" else f" {row['version']}"
    return f"{PROJECTS[row['tuner']]}{version}{', ' if row['variant'] else ''}{row['variant']}"


def scheme(row: dict[str, Any]) -> str:
    """Bits, group and symmetry; llama.cpp's types are schemes of their own, and a plan has several."""
    if row["tuner"] == "llama":
        return "its own"
    bits, group, kind = row["scheme"].split(",")
    if "--target-bits" in row["variant"].split():
        return f"plan, {kind}"
    return f"W{bits}{'' if group == 'none' else f'G{group}'} {kind}"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row as text."""
    asked = row.get("chat_prompts")
    return (
        who(row),
        scheme(row),
        f"{row['bits_per_weight']:.2f}",
        f"{row['kl']:.4f} ± {row['kl_se']:.4f}",
        f"{100 * row['top1']:.1f} %",
        f"{row['perplexity']:.2f}",
        f"{row['chat_sentences']} of {asked}" if asked else "–",
        f"{100 * row['chat_tokens']:.0f} %" if asked else "–",
        f"{row['cpu_s']:.0f}",
        f"{row['peak_gib']:.1f}",
    )


def markdown(file: Path) -> str:
    """All rows, by real bits in steps of a tenth, those that lose most first."""
    rows = [row for schemes in points(file).values() for row in schemes.values()]
    rows.sort(key=lambda row: (round(row["bits_per_weight"], 1), -row["kl"]))
    lines = [HEAD, ("---",) * len(HEAD), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(markdown(Path(sys.argv[1])))
