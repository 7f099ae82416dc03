"""What a model is calibrated on: one recipe on several sources, each compared with the float model on several texts.

    python samples/compare_tuners/calibrations.py --model M --flags "--recipe light --bits 4 --group-size 64" \
        --calibration self --calibration samples/text/calibration.txt \
        --calibration self:0.5,samples/text/calibration.txt:0.5 \
        --text samples/text/heldout.txt --text wikitext2-valid.txt --keep results

Prints a Markdown table: KL to the float model by source and text, and in brackets its ratio to the first source's on
the same windows, with the standard error of that ratio.  --chat adds a column of the float model's own answers to
the 50 prompts of prompts.txt, greedy, answer by answer in place of window by window.
Embeddings and head stay float.  With --keep a run that was stopped goes on: weights are kept by flags, source and the
code's digest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from chat import figures_on, prompts_digest, questions
from contestants import Contestant
from evaluate import Evaluator, Figures, from_file, ratio, to_file
from ours_side import dequantized, stored, tune
from side import Job, answer

from roundexport.calibration.mixture import by_content
from roundexport.calibration.samples import ids_digest, load_calibration
from roundexport.formats.artifact import Artifact
from roundexport.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Column:
    """What weights are compared on.

    Args:
        name: of the column.
        key: for the names of kept figures.
        measure: figures of a folder of weights.
    """

    name: str
    key: str
    measure: Callable[[Path], Figures]


class Sources:
    """Tunes on sources and keeps what came of it.

    Args:
        checkpoint: the float model.
        flags: of ``roundexport tune``.
        kept: folder of results.
    """

    def __init__(self, checkpoint: Checkpoint, flags: str, kept: Path) -> None:
        self.checkpoint, self.flags, self.kept = checkpoint, flags, kept
        self.code = Contestant.parse("ours", {}).version()

    def tuned(self, source: str) -> Path:
        """The folder with the weights that a source gives."""
        key = json.dumps([self.checkpoint.digest, self.flags, by_content(source), self.code])
        folder = self.kept / f"calibrated-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
        if not (folder / "report.json").exists():  # which is written last
            flags = [*shlex.split(self.flags), "--calibration", source]
            job = Job(self.checkpoint.location, np.empty((0, 0)), folder, {"flags": flags})
            folder.mkdir(parents=True, exist_ok=True)
            finished = folder / "artifact"  # of a run that was stopped behind it; tune refuses to write another there
            made = Artifact.open(finished if finished.exists() else tune(job))
            answer(job, self.code, dequantized(made), stored(made))
        return folder

    def figures(self, source: str, column: Column) -> Figures:
        """What a source is worth on a text."""
        folder = self.tuned(source)
        file = folder / f"figures-{column.key}.json"
        if not file.exists():
            to_file(column.measure(folder), file)
        return from_file(file)


def of_text(checkpoint: Checkpoint, text: str, windows: int, kept: Path) -> Column:
    """Windows of a text."""
    ids = load_calibration(checkpoint, text, num_samples=windows).ids
    key = ids_digest(ids)[:10]
    evaluator = Evaluator(checkpoint, ids, kept / f"float-{checkpoint.digest[:10]}-{key}.npy")
    return Column(Path(text).name, key, evaluator.measure)


def of_chat(checkpoint: Checkpoint, kept: Path) -> Column:
    """The float model's own answers."""
    asked = questions(checkpoint, kept / f"answers-{checkpoint.digest[:10]}-{prompts_digest()}.json")
    return Column("own answers", f"chat-{prompts_digest()}", lambda folder: figures_on(checkpoint, folder, asked))


def cell(figures: Figures, first: Figures) -> str:
    """KL, and the ratio to the first source's."""
    told, (times, error) = figures.to_json(), ratio(figures, first)
    same = "" if figures is first else f" ({times:.3f} ± {error:.3f})"
    return f"{told['kl']:.4f} ± {told['kl_se']:.4f}{same}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--flags", default="--recipe light --bits 4 --group-size 64", help="of roundexport tune")
    parser.add_argument("--calibration", action="append", required=True, help="source; may be given more than once")
    parser.add_argument("--text", action="append", required=True, help="held-out text; may be given more than once")
    parser.add_argument("--chat", action="store_true", help="also on the float model's answers to prompts.txt")
    parser.add_argument("--windows", type=int, default=32, help="windows of 512 tokens of each text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", help="folder of results; what is there already is not run again")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(options.keep or scratch)
        checkpoint = Checkpoint.open(options.model)
        sources = Sources(checkpoint, options.flags, kept)
        for source in options.calibration:
            print(f"{source}: {sources.tuned(source)}", file=sys.stderr, flush=True)
        columns = [of_text(checkpoint, text, options.windows, kept) for text in options.text]
        columns += [of_chat(checkpoint, kept)] if options.chat else []
        found = [[sources.figures(source, column) for source in options.calibration] for column in columns]
    print(f"| calibrated on | {' | '.join(column.name for column in columns)} |")
    print(f"|{' --- |' * (1 + len(columns))}")
    for place, source in enumerate(options.calibration):
        print(f"| {source} | {' | '.join(cell(figures[place], figures[0]) for figures in found)} |")


if __name__ == "__main__":
    main()
