"""A package held against the model it stands for, on its own runtime, before it is kept.

Equal integers are not yet equal outputs: an attention mask, a rotary table, a norm or a bias can be wrong beside them.
So a handful of random tokens goes through the package in float32 throughout (`precise`), and through the transformers
model whose weights are the artifact's, dequantized (model/dequantized_model.py, one block in memory at a time; linears
that the package gives eight-bit inputs round theirs alike):

    decoder   two rows as they are; two rows of unequal length into an empty cache, then token by token; one row in two
              pieces, then token by token.  Where a window lies within reach, one longer row that passes it, whole and
              token by token.
    images    two of them, and a single one; hidden states, and the vector beside them where there is one
    encoder   two rows of unequal length, padded; a single short row; one that is longer than a window within reach.
    both      see pair_outputs.py

    difference = max |package - model| / std(model)      over all logits, or hidden states, that are not padding's

Then the first of these runs is repeated as the package ships, with int8 or bfloat16 activations and an 8-bit cache
where the target or the machine has them.  That is a loss, not an error: its mean KL (hidden states: 1 - cosine) is in
the report, and beyond LOSS, about what 4-bit weights lose, in a note.  `verify` measures it on real text.

Tolerance.  Both sides compute in float32, so they differ by the order of sums: 2^-24 relative a term, for K terms and L
layers of some eight products about 2^-24 · sqrt(8 L K), which is 6e-5 at K = 4096 and L = 32; small models show 1e-6 to
1e-5.  A thousandth is allowed.  Weights exist that amplify rounding by more than that (chaotic random ones, saturated
attention), so before a package is refused the model is run again with noise of 2^-22 on its embedding, a few roundings'
worth: what that moves the output, times 16, is allowed too.

Cost.  One pass of the model; seven of the package in float32 and one as shipped, whose weights are dequantized in each,
and opening it twice, which is most of it on OpenVINO. Two steps token by token are run: the first reads what a prompt
left in the cache, the second what a step left, and a third would be the second again. The longer row is run only where
it adds no more than LONG_WORK multiplications, a few seconds on two cores.

Rotary angles that depend on the length of the text are the package's in both (graph/rotary_length.py).  A package for
another device is compared on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import UnsupportedError, WrongOutputsError
from roundexport.formats.package import PackageManifest, read_package
from roundexport.types import HEADLESS, OF_IMAGES, PAIRS

from .package_manifest import INTEGER_INPUTS
from .pair_outputs import ANSWER, pair_inputs, pair_runs

if TYPE_CHECKING:
    from roundexport.formats.artifact import Artifact
    from roundexport.formats.embedding_head import EmbeddingHead
    from roundexport.model.checkpoint import Checkpoint
    from roundexport.model.dequantized_model import DequantizedModel
    from roundexport.runtime.encoder_package import EncoderPackage
    from roundexport.runtime.generation import Decoder

Ids = NDArray[np.int64]
Floats = NDArray[np.floating]

TOLERANCE = 1e-3
NOISE, NOISES = 2.0**-22, 16.0
LENGTH, STEPS, SHORTER = 24, 2, 7  # tokens of a row; of those, the last that come one by one; how much shorter row 1 is
LONG_WORK = 2e11  # multiplications that the longer row may take
LOSS = 0.05  # nats, as shipped
_SEED = 7


@dataclass(frozen=True)
class OutputCheck:
    """How far a package's outputs are from the model's.

    Args:
        difference: the largest, relative to the standard deviation of the model's outputs.
        where: the run and the place at which it was found.
        tolerance: what was allowed.
        tokens: positions compared.
        longest: tokens of the longest row.
        engine: the runtime and its version.
        shipped: mean KL in nats (encoders: 1 - cosine) to the model of the package as it ships.
        seconds: what it took.
    """

    difference: float
    where: str
    tolerance: float
    tokens: int
    longest: int
    engine: str
    shipped: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"outputs within {self.difference:.1e} standard deviations of the dequantized model in float32, "
            f"{self.shipped:.1e} nats away as shipped ({self.tokens} tokens, {self.engine}, {self.seconds:.1f} s)"
        )

    def notes(self, target: str) -> tuple[str, ...]:
        """What a user must read of it."""
        if self.shipped <= LOSS:
            return ()
        advice = {"onnx": "--accuracy-level 0 keeps them float32, and is slower"}
        return (
            f"as shipped, with activations in few bits, the package is {self.shipped:.2g} nats away from what its "
            "weights give in float32, which 4-bit weights may lose; measure it with `verify` on your text; "
            f"{advice.get(target, 'INFERENCE_PRECISION_HINT f32 and KV_CACHE_PRECISION f32 avoid it')}",
        )


@dataclass(frozen=True)
class _Rows:
    """Token ids [B, S] with what goes with them, or pixels; the rows' lengths; whether an image's vector is meant."""

    inputs: dict[str, Any]
    lengths: tuple[int, ...]
    vector: bool = False

    @property
    def ids(self) -> Ids:
        ids: Ids = self.inputs[ANSWER if ANSWER in self.inputs else "input_ids"]
        return ids


@dataclass(frozen=True)
class _Found:
    """What the package gave for input ``rows`` at positions ``start`` and on of one row."""

    run: str
    rows: int
    row: int
    start: int
    values: Floats


def check_outputs(folder: Path, artifact: Artifact, checkpoint: Checkpoint) -> OutputCheck:
    """Compare a finished package with the model that its artifact stands for.

    Args:
        folder: the package.
        artifact: the integers it was made from.
        checkpoint: the float model they came from.

    Raises:
        WrongOutputsError: the package gives other outputs.
        UnsupportedError: its runtime is not installed.
        ArtifactError: the runtime refuses the graph.
    """
    from roundexport.graph.rotary_length import choose_angles
    from roundexport.model.dequantized_model import DequantizedModel

    began = time.monotonic()
    manifest = read_package(folder, check_hashes=False)
    model = DequantizedModel(artifact, checkpoint, bool(manifest.settings.get(INTEGER_INPUTS)))
    choose_angles(model.model, manifest.max_context)
    images = manifest.task in OF_IMAGES
    inputs = list(_images(manifest, checkpoint) if images else _inputs(manifest, checkpoint, model))
    graph = manifest.pooling is not None and manifest.pooling["mode"] == "graph"
    head = checkpoint.embedding_head() if graph else None
    expected = [_reference(model, rows, head) for rows in inputs]
    finite = np.concatenate([values[np.isfinite(values)] for values in expected])
    spread = float(finite.std()) if finite.size else 0.0
    if not spread > 0:
        raise UnsupportedError(
            f"{checkpoint.location}: the model's own outputs are not finite numbers, or all the same"
        )
    found, engine = _run(folder, manifest, inputs)
    worst, where = max((_difference(part, expected[part.rows], spread) for part in found), key=lambda pair: pair[0])
    tolerance = TOLERANCE
    if not worst <= tolerance:
        shaken = [_reference(model, rows, head, NOISE) for rows in inputs]
        moved = max(_apart(a, b).max() for a, b in zip(shaken, expected, strict=True)) / spread
        tolerance = max(tolerance, NOISES * moved)
    if not worst <= tolerance:
        raise WrongOutputsError(_refusal(manifest, worst, where, tolerance, engine))
    return OutputCheck(
        difference=worst,
        where=where,
        tolerance=tolerance,
        tokens=sum(part.values.shape[0] for part in found),
        longest=max(max(rows.lengths) for rows in inputs),
        engine=engine,
        shipped=_shipped(folder, inputs[0], expected[0]),
        seconds=round(time.monotonic() - began, 3),
    )


def _refusal(manifest: PackageManifest, worst: float, where: str, tolerance: float, engine: str) -> str:
    other = "onnx" if manifest.target == "openvino" else "openvino"
    what = "hidden states" if manifest.task in HEADLESS else "logits"
    return (
        f"the {manifest.target} package of this {manifest.model_type} model is wrong and is not kept: on {engine} its "
        f"{what} are {worst:.3g} standard deviations away from those of the dequantized model (allowed: "
        f"{tolerance:.1g}), most of all in {where}.  Its integers are right; the graph or the runtime is not.  "
        f"Try --to {other}, or another version of the runtime, and report it with the model's config.json"
    )


def _inputs(manifest: PackageManifest, checkpoint: Checkpoint, model: DequantizedModel) -> Iterator[_Rows]:
    """The token ids to compare on: two rows, and what else the task and the config ask for."""
    generator = np.random.default_rng(_SEED)
    special = {manifest.tokens["pad"], manifest.tokens["bos"], *manifest.tokens["eos"]}
    usual = np.array([token for token in range(manifest.vocab_size) if token not in special] or [0])
    limit = manifest.max_context
    types = int(checkpoint.config.get("type_vocab_size") or 1)

    def rows(*lengths: int) -> _Rows:
        width = max(lengths)
        ids = generator.choice(usual, (len(lengths), width))
        inputs = {"input_ids": ids}
        if manifest.task != "generate":
            mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
            inputs = {"input_ids": np.where(mask == 1, ids, manifest.tokens["pad"] or 0), "attention_mask": mask}
            if types > 1:
                inputs["token_type_ids"] = generator.integers(0, types, ids.shape) * mask
        return _Rows(inputs, lengths)

    usual_length = min(LENGTH, limit)
    if manifest.task in PAIRS:
        pair = pair_inputs(manifest, checkpoint, usual, usual_length, _SEED)
        yield _Rows(pair, (usual_length,) * len(pair[ANSWER]))
        return
    if manifest.task == "generate":
        yield rows(usual_length, usual_length)
    else:
        yield rows(usual_length, max(1, usual_length - SHORTER))
        yield rows(max(1, usual_length // 3))
    weights = sum(parameter.numel() for parameter in model.model.parameters())
    for reach in _reaches(checkpoint.config):
        longer = reach + STEPS + 2
        if usual_length < longer <= limit and longer * weights <= LONG_WORK:
            yield rows(longer)


def _images(manifest: PackageManifest, checkpoint: Checkpoint) -> Iterator[_Rows]:
    """Two images and one, and the first two once more for the vector that the graph makes of them."""
    from roundexport.calibration.images import drawn_pixels
    from roundexport.model.image_size import size_unit

    pixels, length = drawn_pixels(checkpoint, 3, _SEED), manifest.max_context
    yield _Rows({"pixel_values": pixels[:2]}, (length, length))
    yield _Rows({"pixel_values": pixels[2:]}, (length,))
    if unit := size_unit(checkpoint):
        yield _Rows({"pixel_values": pixels[2:, :, : 3 * unit, : 2 * unit]}, (length,))
    if manifest.pooling is not None and manifest.pooling["mode"] == "head":
        yield _Rows({"pixel_values": pixels[:2]}, (length, length), vector=True)


def _reaches(config: dict[str, Any]) -> list[int]:
    """Lengths at which attention or the rotary embedding may change: windows, original lengths of long contexts."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    wanted = [config.get("sliding_window"), config.get("local_attention"), config.get("attention_chunk_size")]
    wanted += [config.get("original_max_position_embeddings")]
    wanted += [kind.get("original_max_position_embeddings") for kind in kinds]
    return sorted({value for value in wanted if isinstance(value, int) and value > 0})


def _reference(model: DequantizedModel, rows: _Rows, head: EmbeddingHead | None, noise: float = 0.0) -> Floats:
    import torch

    given = {name: torch.from_numpy(values) for name, values in rows.inputs.items()}
    found: Floats = model.run(given, noise, rows.vector).numpy()
    return found if head is None else head(found, rows.inputs["attention_mask"])


def _run(folder: Path, manifest: PackageManifest, inputs: list[_Rows]) -> tuple[list[_Found], str]:
    """What the package gives, and the name and version of its runtime."""
    from roundexport.runtime.generation import Decoder
    from roundexport.runtime.loading import load
    from roundexport.runtime.seq2seq_package import Seq2SeqPackage

    package = load(folder, check_hashes=False, precise=True)
    info = package.info()
    found: list[_Found] = []
    for number, rows in enumerate(inputs):
        if isinstance(package, Seq2SeqPackage):
            found += [
                _Found(run, number, row, start, values) for run, row, start, values in pair_runs(package, rows.inputs)
            ]
            continue
        found += _decoded(package, number, rows) if isinstance(package, Decoder) else _encoded(package, number, rows)
    return found, f"{info['library']} {str(info['version']).partition('-')[0]}"


def _shipped(folder: Path, rows: _Rows, expected: Floats) -> float:
    """Mean KL (hidden states: 1 - cosine) between the model and the package with the settings it ships with."""
    from roundexport.runtime.generation import Decoder
    from roundexport.runtime.loading import load
    from roundexport.runtime.seq2seq_package import Seq2SeqPackage

    package = load(folder, check_hashes=False)
    wanted = expected.astype(np.float64)
    if isinstance(package, Seq2SeqPackage):
        source = {name: values for name, values in rows.inputs.items() if name != ANSWER}
        found = package.logits(source, rows.ids)
    else:
        found = package.logits(rows.ids) if isinstance(package, Decoder) else package.output(rows.inputs)
    if package.manifest.task in HEADLESS:
        lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(wanted, axis=-1)
        lost = 1 - (found * wanted).sum(-1) / lengths
    else:
        ours, theirs = (_log_softmax(_two_sided(logits.astype(np.float64))) for logits in (found, wanted))
        lost = (np.exp(theirs) * (theirs - ours)).sum(-1)
    reads = not isinstance(package, Decoder | Seq2SeqPackage)
    if reads and lost.ndim > 1 and "attention_mask" in rows.inputs:
        lost = lost[rows.inputs["attention_mask"] == 1]
    loss = float(lost.mean())
    if not np.isfinite(loss):
        raise WrongOutputsError(f"the package gives no finite numbers on {package.info()} as it ships; it is not kept")
    return max(0.0, loss)


def _two_sided(logits: Floats) -> Floats:
    """A single label [..., 1] beside its absence; several labels as they are."""
    return np.concatenate([logits, np.zeros_like(logits)], -1) if logits.shape[-1] == 1 else logits


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(-1, keepdims=True)
    normed: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normed


def _decoded(decoder: Decoder, number: int, rows: _Rows) -> Iterator[_Found]:
    ids = rows.ids
    length = ids.shape[1]
    for row, values in enumerate(decoder.logits(ids)):
        yield _Found("a whole prompt", number, row, 0, values)
    ends = [max(1, length - STEPS - (SHORTER if row else 0)) for row in range(len(ids))]
    runs = [("a batch of unequal rows", ids, [ends])]
    if len(ids) > 1:
        runs.append(("a prompt in two pieces", ids[:1], [[max(1, length // 3)], [ends[0]]]))
    for run, chosen, pieces in runs:
        yield from _stepwise(decoder, f"{run}, then token by token", number, chosen, pieces)


def _stepwise(decoder: Decoder, run: str, number: int, ids: Ids, pieces: list[list[int]]) -> Iterator[_Found]:
    """Rows appended up to the ends that each piece names, then one token at a time."""
    places = [0] * len(ids)
    with decoder.start(rows=len(ids)) as session:
        numbers = session.add(len(ids))
        for ends in pieces:
            given = [row[begin:end].tolist() for row, begin, end in zip(ids, places, ends, strict=True)]
            if not all(given):
                continue
            places = ends
            for row, values in enumerate(session.extend(dict(zip(numbers, given, strict=True))).copy()):
                yield _Found(run, number, row, places[row] - 1, values[None])
        while max(places) < ids.shape[1]:
            new = {number: [int(ids[row, places[row]])] for row, number in enumerate(numbers)}
            values = session.extend(new).copy()
            for row in range(len(ids)):
                yield _Found(run, number, row, places[row], values[row][None])
            places = [place + 1 for place in places]


def _encoded(package: EncoderPackage, number: int, rows: _Rows) -> Iterator[_Found]:
    run = "a padded batch" if len(set(rows.lengths)) > 1 else "a single row" if len(rows.lengths) == 1 else "a batch"
    for row, values in enumerate(package.output(rows.inputs, rows.vector)):
        yield _Found(run, number, row, 0, values[: rows.lengths[row]] if values.ndim > 1 else values[None])


def _difference(part: _Found, expected: Floats, spread: float) -> tuple[float, str]:
    """The largest difference of a part, in standard deviations, and its place in words."""
    wanted = expected[part.row][None] if expected.ndim < 3 else expected[part.row, part.start :][: len(part.values)]
    by_token = _apart(part.values, wanted).max(-1) / spread
    place = int(by_token.argmax())
    token = part.start + place + 1
    at = f"token {token} of {expected.shape[1]}" if expected.ndim > 2 else "of whole texts"
    return float(by_token[place]), f"{part.run}, row {part.row + 1}, {at}"


def _apart(found: Floats, wanted: Floats) -> Floats:
    """|found - wanted|; 0 where both are the same infinity, infinite where only one is a number."""
    with np.errstate(invalid="ignore"):
        apart = np.where(found == wanted, 0, np.abs(found - wanted))
    return np.where(np.isnan(apart), np.inf, apart)
