"""The table of families: as it ships (proven.json), as it is being made, and in words.

A table knows the machine and the versions that it was made with.  A file of it is whole after every row, so that a run
that was cut off goes on where it was; rows made with other versions are not mixed in.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from roundexport.environment.versions import library_versions
from roundexport.errors import ArtifactError, UsageError
from roundexport.storage.atomic import replace_file
from roundexport.storage.strict_json import parse

from .row import Row, State

PROVEN = Path(__file__).with_name("proven.json")
COMMAND = "roundexport list families --prove"


@dataclass(frozen=True)
class Table:
    """Rows, and where they were made.

    Args:
        machine: processor and its instruction sets.
        versions: of every library that has a part in it.
        rows: in the order of configurations.json, or as they were asked for.
    """

    machine: str
    versions: Mapping[str, str]
    rows: tuple[Row, ...] = ()

    @classmethod
    def here(cls) -> Table:
        """An empty one, of this machine and its versions."""
        from roundexport.runtime.machine import machine_info

        info = machine_info()
        machine = f"{info['cpu']} ({' '.join(info['instruction_sets'])})"
        names = ("onnxruntime", "openvino")
        engines = {name: info["versions"][name] for name in names if name in info["versions"]}
        return cls(machine, {**library_versions(), **engines})

    @classmethod
    def read(cls, path: Path) -> Table:
        """A table from its file.

        Raises:
            ArtifactError: it is damaged.
        """
        try:
            found = parse(path.read_bytes(), str(path))
            return cls(found["machine"], found["versions"], tuple(map(Row.from_json, found["rows"])))
        except (OSError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path}: not a table of families: {type(error).__name__}: {error}") from error

    def write(self, path: Path) -> None:
        """Put it into a file, a row a line."""
        rows = ",\n".join(f" {json.dumps(row.to_json())}" for row in self.rows)
        head = f'"machine": {json.dumps(self.machine)},\n"versions": {json.dumps(dict(self.versions))}'
        replace_file(path, f'{{\n{head},\n"rows": [\n{rows}\n]}}\n'.encode())

    def with_row(self, row: Row, order: Sequence[str]) -> Table:
        """The table with this row, in place of an earlier one of the same family."""
        rows = {**{old.family: old for old in self.rows}, row.family: row}
        places = {name: place for place, name in enumerate(order)}
        ordered = sorted(rows.values(), key=lambda one: places.get(one.family, len(places)))
        return replace(self, rows=tuple(ordered))

    def only(self, names: Iterable[str]) -> Table:
        """The rows of some families; all where none is named."""
        wanted = set(names)
        return replace(self, rows=tuple(row for row in self.rows if not wanted or row.family in wanted))

    def count(self, state: State) -> int:
        """Rows of which some target is in this state."""
        return sum(any(outcome.state == state for outcome in row.outcomes.values()) for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """The table as a JSON object."""
        return {
            "machine": self.machine,
            "versions": dict(self.versions),
            "rows": [row.to_json() for row in self.rows],
        }

    @property
    def made_with(self) -> str:
        """Machine and versions in a line."""
        return f"{self.machine}; {', '.join(f'{name} {version}' for name, version in self.versions.items())}"

    @property
    def rows_by_place(self) -> str:
        """How many rows were made where and by which commit, in a line; empty where no row kept it."""
        kept = Counter((row.machine, row.commit) for row in self.rows)
        if not any(machine for machine, _ in kept):
            return ""
        told = [
            f"{count} at {commit or 'no commit'}{f' on {machine}' if machine != self.machine else ''}"
            for (machine, commit), count in kept.items()
            if machine
        ]
        unknown = sum(count for (machine, _), count in kept.items() if not machine)
        return "Rows: " + ", ".join([*told, *([f"{unknown} before commits were kept"] if unknown else [])])

    def printed(self) -> list[dict[str, Any]]:
        """Rows for a table of text: a column each for the figure and the fused layers of every target."""
        found = []
        for row in self.rows:
            shown: dict[str, Any] = {"family": row.family, "model": row.model, "task": row.task or "-"}
            shown["own"] = "" if row.own is None else f"{row.own:.0e}"
            for target, outcome in row.outcomes.items():
                shown[target] = outcome.in_words + (f" ({outcome.fused})" if outcome.fused else "")
            found.append({**shown, "reason": row.reason})
        return found

    def summary(self) -> str:
        """How many families came to what."""
        both = sum(all(outcome.state == "right" for outcome in row.outcomes.values()) for row in self.rows)
        wrong = self.count("failed")
        noisy = sum(any(outcome.noisy for outcome in row.outcomes.values()) for row in self.rows)
        by_own = f", {noisy} by transformers' own error alone" if noisy else ""
        return (
            f"{len(self.rows)} families: {self.count('right')} right, {both} of them on every target asked for"
            f"{by_own}; {self.count('refused')} refused on one or more; {wrong} failed"
        )


@cache
def proven() -> Table:
    """The table that ships."""
    return Table.read(PROVEN)


def begun(path: Path | None) -> Table:
    """The table to go on with: of a file that an earlier run left, or an empty one.

    Raises:
        UsageError: the file was made with other versions.
    """
    here = Table.here()
    if path is None or not path.exists():
        return here
    earlier = Table.read(path)
    if dict(earlier.versions) != dict(here.versions):
        raise UsageError(f"{path} was made with other versions ({earlier.made_with}); remove it, or name another file")
    return earlier


def markdown(table: Table) -> str:
    """A page of documentation."""
    targets = list(table.rows[0].outcomes) if table.rows else []
    head = ["family", "transformers' class", "task", "own", *targets, "reason"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in table.printed():
        cells = [
            row["family"],
            f"`{row['model']}`",
            row["task"],
            row["own"],
            *(row[target] for target in targets),
            row["reason"],
        ]
        lines.append(" | ".join(cell.replace("|", "\\|") for cell in cells))
    silent = any(o.difference is not None and o.own is None for row in table.rows for o in row.outcomes.values())
    return _PAGE.format(
        empty=_EMPTY if silent else "",
        summary=table.summary(),
        made_with=table.made_with,
        rows=f" {table.rows_by_place}." if table.rows_by_place else "",
        table="\n".join(f"| {line} |" for line in lines),
        failed=_failures(table),
    )


def _failures(table: Table) -> str:
    """A paragraph with every row that failed; empty where none did."""
    found = [
        f"{row.family} on {target}: {outcome.failure}"
        for row in table.rows
        for target, outcome in row.outcomes.items()
        if outcome.state == "failed"
    ]
    return f"\n**Failed.** {'; '.join(found)}.\n" if found else ""


_EMPTY = """Where own is empty the row was tried before it was computed.
"""
_PAGE = """# Families

{summary}.

A figure is the largest difference to transformers' own model in float32, in standard deviations of its outputs: whole
prompts, prompts in pieces, 32 tokens one by one, three unequal rows together; of encoders and heads a padded batch of
three and a single row; of images three and one; of sounds three, one and a shorter one; of models with two halves whole
answers, pieces, and beams that change places. Own: what transformers' float32 is away from its own float64 on the same
inputs. A row is right below 1e-4, or below twice its own error, which is what two float32 computations may differ by.
In brackets: attention layers that the runtime runs as one operator, of all. Weights are random and such that 8 bits
hold them exactly; each model has two layers and is tuned by `rtn`.
{empty}
`roundexport list families --prove --record FILE`, then `roundexport list families --markdown`.
{made_with}.{rows}

{table}

**Fewer in brackets than layers.** On OpenVINO the plugin's operator has no place for soft-capping (Gemma 2,
VaultGemma) and computes sinks (GPT-OSS) and position biases (BLOOM, MPT, Falcon with ALiBi) wrongly in 2026.4.1, so
those are spelled out ([0034](decisions/0034-rotary-inside-the-operator.md)); so is Llama 4's attention in chunks,
whose mask paged attention would drop ([0050](decisions/0050-mamba-lightning-and-experts-outside-the-registry.md)).
Encoders are 0/0 there: the plugin compiles their attention into subgraphs, which are not counted. Decoders that embed
or classify are 0/2 on ONNX: their keys have fewer heads than their queries, which MultiHeadAttention does not take and
GroupQueryAttention only with a cache.

**Refused.** PaliGemma's prompt is read both ways, which attention with a cache is not: a limit of the runtimes.
{failed}"""
