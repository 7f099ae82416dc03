"""Families tried one after another, each in a process of its own: one that dies, or never ends, is a row and no more.

Processes are forked from one that has imported torch and transformers and done nothing else, so that a family does not
pay for that.  What a family's libraries print goes nowhere; the last line is told where the process died.
"""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from roundexport.environment.tree_commit import tree_commit
from roundexport.progress import Progress

from .configurations import Family, families
from .row import Outcome, Row
from .table import Table, begun

PRELOADED = ("torch.onnx", "onnxscript", "numba", "transformers.models.auto.modeling_auto")
LONGEST = 1800.0  # seconds of a family
LEAVING = 60.0  # seconds that a process may take to end after its row, which counts whatever becomes of it


@dataclass(frozen=True)
class Prover:
    """How families are tried.

    Args:
        work: the module whose function ``tried_as_json`` a process calls with a family and targets.
        preloaded: modules that it has from the start.
        longest: seconds after which it is ended.
        leaving: seconds after which it is ended when its row is there.
    """

    work: str
    preloaded: tuple[str, ...] = PRELOADED
    longest: float = LONGEST
    leaving: float = LEAVING

    def prove(self, family: Family, targets: Sequence[str]) -> Row:
        """What one family comes to, in a process of its own."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(self.preloaded))
        ours, theirs = context.Pipe(duplex=False)
        with tempfile.TemporaryDirectory(prefix="roundexport-family-") as scratch, ours:
            printed = Path(scratch) / "printed"
            process = context.Process(target=_child, args=(theirs, self.work, family, targets, str(printed)))
            process.start()
            theirs.close()
            told = multiprocessing.connection.wait([ours, process.sentinel], self.longest)
            found = _received(ours)
            if not told:
                process.kill()
                process.join()
                return _lost(family, targets, f"it was ended after {self.longest:.0f} s")
            process.join(self.leaving)
            if process.is_alive():
                process.kill()
                process.join()
            return Row.from_json(found) if found is not None else _lost(family, targets, _death(process, printed))


def prove_all(
    chosen: Sequence[Family],
    targets: Sequence[str],
    prover: Prover,
    record: Path | None = None,
    progress: bool | Progress = True,
) -> Table:
    """Try families, and keep what was found after each.

    Args:
        chosen: which.
        targets: names of targets.
        prover: how.
        record: file to keep the table in; one that an earlier run of the same versions left is gone on with.
        progress: report on stderr, or where to report.

    Returns:
        The whole table of the record, or of this call.

    Raises:
        UsageError: the record was made with other versions.
    """
    table, order = begun(record), list(families())
    machine, commit = Table.here().machine, tree_commit()
    with Progress.of(progress) as shown, shown.stage("trying families") as stage:
        for number, family in enumerate(chosen):
            stage.at(number / len(chosen), family.name)
            row = replace(prover.prove(family, targets), machine=machine, commit=commit)
            table = table.with_row(row, order)
            if record is not None:
                table.write(record)
            shown.say(f"{family.name}: {_told(row)} ({row.seconds:.0f} s)")
    return table


def missing(chosen: Sequence[Family], targets: Sequence[str], record: Path | None) -> list[Family]:
    """Those of which a record does not say yet what they come to on these targets."""
    done = {row.family for row in begun(record).rows if set(targets) <= set(row.outcomes)}
    return [family for family in chosen if family.name not in done]


def _told(row: Row) -> str:
    figures = ", ".join(f"{target} {outcome.in_words}" for target, outcome in row.outcomes.items())
    return figures + (f": {row.reason}" if row.reason else "")


def _child(connection: Connection, work: str, family: Family, targets: Sequence[str], printed: str) -> None:
    """What a process does; runs in it alone."""
    descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    connection.send(importlib.import_module(work).tried_as_json(family, targets))
    connection.close()


def _received(connection: Connection) -> Mapping[str, Any] | None:
    try:
        return connection.recv() if connection.poll() else None
    except EOFError:
        return None


def _death(process: Any, printed: Path) -> str:
    code = process.exitcode
    lines = printed.read_text(encoding="utf-8", errors="replace").split("\n") if printed.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
    return f"its process died {how}{f': {last:.300}' if last else ''}"


def _lost(family: Family, targets: Sequence[str], why: str) -> Row:
    return Row(family.name, family.model, "", dict.fromkeys(targets, Outcome(failed=why)))
