"""Tuners side by side: same model, calibration tokens and scheme; loss against the float model in one evaluator.

    python samples/compare_tuners/compare.py --scheme 4,128,asym --scheme 2,64,sym
    python samples/compare_tuners/compare.py --scheme 4,128,sym --tuner rtn --tuner "ours:--recipe best" \
        --tuner auto-round:best --python auto-round=.auto-round/bin/python --keep results --json rows.jsonl

Every tuner runs in a process of its own (and, with --python, in an environment of its own), whose CPU seconds (user +
system, start-up included) and peak memory are what the table shows.  Embeddings and head stay float for all.  Weights
are compared after dequantization.  Contestants: see contestants.py; what is equal and what is not: README.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chat import Agreement, agreement, prompts_digest, questions
from contestants import Contestant, NotOfferedError, Scheme
from cost import Cost, TunerError, measured, median_cost
from evaluate import Evaluator, Figures, from_file, ratio, to_file

from roundexport.calibration.samples import ids_digest, load_calibration
from roundexport.model.checkpoint import Checkpoint

SAMPLES = Path(__file__).resolve().parent.parent
HEAD = ("tuner", "bits/w", "KL", "of first", "top-1", "perplexity", "chat", "CPU s", "wall s", "peak GiB")
STARRED = HEAD.index("CPU s")

Run = tuple[Cost, Figures, Agreement | None]


@dataclass(frozen=True, eq=False)
class Row:
    """One contestant at one scheme: medians over the rounds."""

    contestant: Contestant
    version: str
    cost: Cost
    figures: Figures
    chat: Agreement | None
    rounds: int


class Runner:
    """Runs contestants on one model and its calibration tokens, and remembers what was run.

    Args:
        checkpoint: the float model.
        options: the command line.
    """

    def __init__(self, checkpoint: Checkpoint, options: argparse.Namespace) -> None:
        self.checkpoint = checkpoint
        self.options = options
        self.ids = load_calibration(checkpoint, options.calibration).ids
        held_out = load_calibration(checkpoint, options.text).ids[: options.windows]
        self.held_out = ids_digest(held_out)
        self.scratch = tempfile.TemporaryDirectory()
        kept = Path(options.keep or self.scratch.name)
        kept.mkdir(parents=True, exist_ok=True)
        name = f"float-{checkpoint.digest[:10]}-{self.held_out[:10]}.npy"
        self.evaluator = Evaluator(checkpoint, held_out, kept / name)
        asked = kept / f"answers-{checkpoint.digest[:10]}-{prompts_digest()}.json"
        self.questions = questions(checkpoint, asked) if options.chat else None
        self.versions: dict[Contestant, str] = {}

    def run(self, contestant: Contestant, scheme: Scheme, turn: int) -> Run:
        """One run, or what was kept of it.

        Raises:
            TunerError: the tuner's process ended with an error.
            NotOfferedError: the tuner has no such scheme.
        """
        settings = contestant.settings(scheme, self.options.calibration)
        if self.options.keep is None:
            with tempfile.TemporaryDirectory() as folder:
                cost = self._tune(contestant, settings, Path(folder))
                return cost, self.evaluator.measure(Path(folder)), self._chat(Path(folder))
        key = {
            "tuner": contestant.tuner,
            "version": self.version(contestant),
            "settings": settings,
            "model": self.checkpoint.digest,
            "ids": ids_digest(self.ids),
            "turn": turn,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]
        name = re.sub(r"[^\w.-]+", "-", f"{scheme}-{contestant.label}-{turn}-{digest}")
        folder = Path(self.options.keep) / name
        if not (folder / "cost.json").exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed, which must not be taken up half-way
            folder.mkdir(parents=True)
            cost = self._tune(contestant, settings, folder)
            (folder / "cost.json").write_text(json.dumps({**asdict(cost), "key": key}))  # last: the run is whole
        document = json.loads((folder / "cost.json").read_text())
        document.pop("key")
        figures = folder / f"figures-{self.held_out[:10]}.json"
        if not figures.exists():
            to_file(self.evaluator.measure(folder), figures)
        return Cost(**document), from_file(figures), self._chat(folder)

    def version(self, contestant: Contestant) -> str:
        """The contestant's version, asked for once."""
        if contestant not in self.versions:
            self.versions[contestant] = contestant.version()
        return self.versions[contestant]

    def _chat(self, folder: Path) -> Agreement | None:
        """How far the weights in a folder give the float model's answers; what is there already is read."""
        if self.questions is None:
            return None
        kept = folder / f"chat-{prompts_digest()}.json"
        if not kept.exists():
            kept.write_text(json.dumps(asdict(agreement(self.evaluator.load(folder)[0], self.questions))))
        return Agreement(**json.loads(kept.read_text()))

    def _tune(self, contestant: Contestant, settings: dict[str, Any], folder: Path) -> Cost:
        with tempfile.TemporaryDirectory() as scratch:
            np.save(f"{scratch}/ids.npy", self.ids)
            where = (str(self.checkpoint.folder), f"{scratch}/ids.npy", str(folder))
            line = [contestant.python, str(contestant.side), *where, json.dumps(settings)]
            return measured(line, self.options.threads)


def median(runs: list[Run]) -> Run:
    """Costs number by number; the figures of the run whose KL is the (lower) median."""
    _, figures, chat = sorted(runs, key=lambda run: run[1].kl.mean())[(len(runs) - 1) // 2]
    return median_cost([run[0] for run in runs]), figures, chat


def compare(runner: Runner, scheme: Scheme, contestants: list[Contestant]) -> tuple[list[Row], int]:
    """All contestants at one scheme, in turn; returns their rows and how many failed."""
    runs: dict[Contestant, list[Run]] = {}
    out: set[Contestant] = set()
    failed = 0
    for turn in range(runner.options.repeat):
        for contestant in contestants:
            if contestant in out:
                continue
            try:
                run = runner.run(contestant, scheme, turn)
            except NotOfferedError as reason:
                note(f"{scheme} {contestant.label}: {reason}")
                out.add(contestant)
            except (TunerError, ValueError) as error:
                note(f"{scheme} {contestant.label} failed:\n{error}")
                out.add(contestant)
                failed += 1
            else:
                note(f"{scheme} {contestant.label}: KL {run[1].kl.mean():.5f}, {run[0].cpu_s:.0f} CPU s")
                runs.setdefault(contestant, []).append(run)
    rows = [
        Row(contestant, runner.version(contestant), *median(done), len(done))
        for contestant, done in runs.items()
        if contestant not in out
    ]
    return rows, failed


def cells(row: Row, first: Row) -> tuple[str, ...]:
    """A row as text; CPU seconds from another processor or number of threads than the first row's get a star."""
    figures, cost = row.figures.to_json(), row.cost
    alike = (cost.instruction_set, cost.threads) == (first.cost.instruction_set, first.cost.threads)
    times, error = ratio(row.figures, first.figures)
    return (
        row.contestant.label,
        f"{figures['bits_per_weight']:.3f}",
        f"{figures['kl']:.5f} ± {figures['kl_se']:.5f}",
        "1" if row is first else f"{times:.3f} ± {error:.3f}",
        f"{figures['top1']:.4f} ± {figures['top1_se']:.4f}",
        f"{figures['perplexity']:.2f} ± {figures['perplexity_se']:.2f}",
        row.chat.text() if row.chat else "-",
        f"{cost.cpu_s:.0f}{'' if alike else '*'}",
        f"{cost.wall_s:.0f}",
        f"{cost.peak_gib:.2f}",
    )


def show(scheme: Scheme, rows: list[Row]) -> None:
    """Print one scheme's table."""
    lines = [HEAD, *(cells(row, rows[0]) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{scheme}  ({rows[0].rounds} round{'s' if rows[0].rounds > 1 else ''})")
    for line in lines:
        print("  ".join(text.rjust(width) if place else text.ljust(width)
                        for place, (text, width) in enumerate(zip(line, widths, strict=True))), flush=True)  # fmt: skip
    if any(line[STARRED].endswith("*") for line in lines):
        print("* measured on another instruction set, or with other threads, than the first row")


def record(row: Row, scheme: Scheme, model: str) -> dict[str, Any]:
    """A row as JSON, as rows.py and plot.py read it and record.jsonl keeps it."""
    contestant = row.contestant
    who = {"label": contestant.label, "tuner": contestant.tuner, "variant": contestant.variant, "version": row.version}
    return {
        "scheme": str(scheme),
        "model": Path(model).name,
        **who,
        **row.figures.to_json(),
        **(row.chat.to_json() if row.chat else {}),
        **asdict(row.cost),
        "rounds": row.rounds,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},  # of the evaluator
    }


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SAMPLES / "model"))
    parser.add_argument("--calibration", default=str(SAMPLES / "text" / "calibration.txt"))
    parser.add_argument("--text", default=str(SAMPLES / "text" / "heldout.txt"), help="held-out text")
    parser.add_argument("--windows", type=int, default=64, help="windows of 512 held-out tokens")
    parser.add_argument("--chat", action="store_true", help="ask the prompts of prompts.txt too; see chat.py")
    parser.add_argument("--scheme", action="append", help="bits,group,sym|asym; may be given more than once")
    parser.add_argument("--tuner", action="append", help="contestant, see contestants.py; may be given more than once")
    parser.add_argument("--python", action="append", default=[], metavar="TUNER=PATH", help="a tuner's interpreter")
    parser.add_argument("--repeat", type=int, default=1, help="rounds, all contestants in turn; medians are shown")
    parser.add_argument("--keep", help="folder of results; what is there already is not run again")
    parser.add_argument("--json", help="file to which rows are appended, one JSON object a line")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def main() -> int:
    options = options_of()
    torch.set_num_threads(options.threads)
    pythons = dict(pair.split("=", 1) for pair in options.python)
    names = options.tuner or ["rtn", "default=ours:--recipe default", *pythons]
    contestants = [Contestant.parse(name, pythons) for name in names]
    schemes = [Scheme.parse(text) for text in options.scheme or ["4,128,asym", "4,128,sym"]]
    runner = Runner(Checkpoint.open(options.model), options)
    print(
        f"calibration {list(runner.ids.shape)}, held out {list(runner.evaluator.ids.shape)}, {options.threads} threads"
    )
    failures = 0
    for scheme in schemes:
        rows, failed = compare(runner, scheme, contestants)
        failures += failed
        if rows:
            show(scheme, rows)
        if options.json:
            with Path(options.json).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record(row, scheme, runner.checkpoint.location)) + "\n" for row in rows)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
