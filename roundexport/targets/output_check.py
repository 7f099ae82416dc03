"""A package held against the model it stands for, on its own runtime, before it is kept.

Equal integers are not yet equal outputs: an attention mask, a rotary table, a norm or a bias can be wrong beside them.
So a handful of random tokens goes through the package in float32 throughout (`precise`), and through the transformers
model whose weights are the artifact's, dequantized (model/dequantized_model.py, one block in memory at a time; linears
that the package gives eight-bit inputs round theirs alike):

    decoder   two rows as they are; two rows of unequal length into an empty cache, then token by token; one row in two
              pieces, then token by token.  Where a window lies within reach, one longer row that passes it, whole and
              token by token.
    sounds    two of one length, and a shorter one
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
worth: what that moves the output, times 16, is allowed too.  Where inputs of linears are integers, the output moves by
leaps: an input beside a half gets another code.  A noise of a few roundings may meet none of these where the package
does, so it is 2^-18 there, about what sums may differ by, and twice what it moves is allowed: leaps do not grow with
the noise, and of two draws either may have the larger one.

Cost. One pass of the model; seven of the package in float32 and one as shipped, whose weights are dequantized in
each, and opening it twice, which is most of it on OpenVINO; a runtime takes twice the package's size to open it.
Where that does not fit in memory, the package is run section by section (package_runs.py). Two steps token by token
are run: the first reads what a prompt left in the cache, the second what a step left, and a third would be the second
again. The longer row is run only where it adds no more than LONG_WORK multiplications, a few seconds on two cores.

Rotary angles that depend on the length of the text are the package's in both (graph/rotary_length.py).  A package for
another device is compared on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from roundexport.environment.memory import MemoryLimit
from roundexport.errors import UnsupportedError, WrongOutputsError
from roundexport.formats.package import PackageManifest, read_package
from roundexport.types import HEADLESS, OF_IMAGES, PAIRS

from .package_manifest import INTEGER_INPUTS
from .package_runs import SHORTER, STEPS, Floats, Found, Rows, package_outputs, shipped_outputs
from .pair_outputs import ANSWER, pair_inputs

if TYPE_CHECKING:
    from roundexport.formats.artifact import Artifact
    from roundexport.formats.embedding_head import EmbeddingHead
    from roundexport.model.checkpoint import Checkpoint
    from roundexport.model.dequantized_model import DequantizedModel

TOLERANCE = 1e-3
NOISE, NOISES = 2.0**-22, 16.0
NOISE_OF_CODES, NOISES_OF_CODES = 2.0**-18, 2.0
LENGTH = 24  # tokens of a row
OPENED = 2  # so many times its size a package takes while its runtime opens it
LEAST_SECTION = 16 << 20
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


def section_bytes(manifest: PackageManifest, limit: MemoryLimit) -> int | None:
    """Bytes of weights of a section in which a package that does not fit in memory is run; None: it fits as a whole."""
    from roundexport.runtime.sections import takes_sections

    size, room = sum(entry["size"] for entry in manifest.files.values()), limit.left()
    return None if OPENED * size <= room or not takes_sections(manifest) else max(LEAST_SECTION, room // 5)


def check_outputs(
    folder: Path,
    artifact: Artifact,
    checkpoint: Checkpoint,
    limit: MemoryLimit | None = None,
    doing: Callable[[str], None] = lambda _: None,
) -> OutputCheck:
    """Compare a finished package with the model that its artifact stands for.

    Args:
        folder: the package.
        artifact: the integers it was made from.
        checkpoint: the float model they came from.
        limit: memory to stay within; if not given, what is free.
        doing: takes what is being run, in words.

    Raises:
        WrongOutputsError: the package gives other outputs.
        UnsupportedError: its runtime is not installed.
        ArtifactError: the runtime refuses the graph.
    """
    from roundexport.graph.rotary_length import choose_angles
    from roundexport.model.dequantized_model import DequantizedModel

    began = time.monotonic()
    doing("the model with the artifact's weights")
    manifest = read_package(folder, check_hashes=False)
    integers = bool(manifest.settings.get(INTEGER_INPUTS))
    model = DequantizedModel(artifact, checkpoint, integers)
    choose_angles(model.model, manifest.max_context)
    images = manifest.task in OF_IMAGES
    if images:
        inputs = list(_images(manifest, checkpoint))
    elif manifest.task == "ctc":
        inputs = list(_sounds(checkpoint))
    else:
        inputs = list(_inputs(manifest, checkpoint, model))
    graph = manifest.pooling is not None and manifest.pooling["mode"] == "graph"
    head = checkpoint.embedding_head() if graph else None
    expected = [_reference(model, rows, head) for rows in inputs]
    finite = np.concatenate([values[np.isfinite(values)] for values in expected])
    spread = float(finite.std()) if finite.size else 0.0
    if not spread > 0:
        raise UnsupportedError(
            f"{checkpoint.location}: the model's own outputs are not finite numbers, or all the same"
        )
    sections = section_bytes(manifest, limit or MemoryLimit())
    doing("the package in float32")
    found, engine = package_outputs(folder, manifest, inputs, sections)
    worst, where = max((_difference(part, expected[part.rows], spread) for part in found), key=lambda pair: pair[0])
    tolerance = TOLERANCE
    if not worst <= tolerance:
        doing("the model with its embedding shaken")
        noise, noises = (NOISE_OF_CODES, NOISES_OF_CODES) if integers else (NOISE, NOISES)
        shaken = [_reference(model, rows, head, noise) for rows in inputs]
        moved = max(_apart(a, b).max() for a, b in zip(shaken, expected, strict=True)) / spread
        tolerance = max(tolerance, noises * moved)
    if not worst <= tolerance:
        raise WrongOutputsError(_refusal(manifest, worst, where, tolerance, engine))
    doing("the package as it ships")
    return OutputCheck(
        difference=worst,
        where=where,
        tolerance=tolerance,
        tokens=sum(part.values.shape[0] for part in found),
        longest=max(max(rows.lengths) for rows in inputs),
        engine=engine,
        shipped=_loss(manifest, inputs[0], shipped_outputs(folder, manifest, inputs[0], sections), expected[0]),
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


def _inputs(manifest: PackageManifest, checkpoint: Checkpoint, model: DequantizedModel) -> Iterator[Rows]:
    """The token ids to compare on: two rows, and what else the task and the config ask for."""
    generator = np.random.default_rng(_SEED)
    special = {manifest.tokens["pad"], manifest.tokens["bos"], *manifest.tokens["eos"]}
    usual = np.array([token for token in range(manifest.vocab_size) if token not in special] or [0])
    limit = manifest.max_context
    types = int(checkpoint.config.get("type_vocab_size") or 1)

    def rows(*lengths: int) -> Rows:
        width = max(lengths)
        ids = generator.choice(usual, (len(lengths), width))
        inputs = {"input_ids": ids}
        if manifest.task != "generate":
            mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
            inputs = {"input_ids": np.where(mask == 1, ids, manifest.tokens["pad"] or 0), "attention_mask": mask}
            if types > 1:
                inputs["token_type_ids"] = generator.integers(0, types, ids.shape) * mask
        return Rows(inputs, lengths)

    usual_length = min(LENGTH, limit)
    if manifest.task in PAIRS:
        pair = pair_inputs(manifest, checkpoint, usual, usual_length, _SEED)
        yield Rows(pair, (usual_length,) * len(pair[ANSWER]))
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


def _images(manifest: PackageManifest, checkpoint: Checkpoint) -> Iterator[Rows]:
    """Two images and one, and the first two once more for the vector that the graph makes of them."""
    from roundexport.calibration.images import drawn_pixels
    from roundexport.model.image_size import size_unit

    pixels, length = drawn_pixels(checkpoint, 3, _SEED), manifest.max_context
    yield Rows({"pixel_values": pixels[:2]}, (length, length))
    yield Rows({"pixel_values": pixels[2:]}, (length,))
    if unit := size_unit(checkpoint):
        yield Rows({"pixel_values": pixels[2:, :, : 3 * unit, : 2 * unit]}, (length,))
    if manifest.pooling is not None and manifest.pooling["mode"] == "head":
        yield Rows({"pixel_values": pixels[:2]}, (length, length), vector=True)


def _sounds(checkpoint: Checkpoint) -> Iterator[Rows]:
    """Two sounds and a shorter one, which is alone."""
    from roundexport.calibration.waveforms import drawn_samples
    from roundexport.runtime.speech.waveform import frame_size, frames_of, least_samples

    config, size = checkpoint.config, frame_size(checkpoint.config, checkpoint.location)
    for count, frames in ((2, LENGTH), (1, LENGTH // 2)):
        samples = drawn_samples(count, least_samples(config) + frames * size - 1, _SEED)
        yield Rows({"input_values": samples}, (frames_of(config, samples.shape[1]),) * count)


def _reaches(config: dict[str, Any]) -> list[int]:
    """Lengths at which attention or the rotary embedding may change: windows, original lengths of long contexts."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    wanted = [config.get("sliding_window"), config.get("local_attention"), config.get("attention_chunk_size")]
    wanted += [config.get("original_max_position_embeddings")]
    wanted += [kind.get("original_max_position_embeddings") for kind in kinds]
    return sorted({value for value in wanted if isinstance(value, int) and value > 0})


def _reference(model: DequantizedModel, rows: Rows, head: EmbeddingHead | None, noise: float = 0.0) -> Floats:
    import torch

    given = {name: torch.from_numpy(values) for name, values in rows.inputs.items()}
    found: Floats = model.run(given, noise, rows.vector).numpy()
    return found if head is None else head(found, rows.inputs["attention_mask"])


def _loss(manifest: PackageManifest, rows: Rows, found: Floats, expected: Floats) -> float:
    """Mean KL (hidden states: 1 - cosine) between the model and what the package gives as it ships."""
    wanted = expected.astype(np.float64)
    if manifest.task in HEADLESS:
        lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(wanted, axis=-1)
        lost = 1 - (found * wanted).sum(-1) / lengths
    else:
        ours, theirs = (_log_softmax(_two_sided(logits.astype(np.float64))) for logits in (found, wanted))
        lost = (np.exp(theirs) * (theirs - ours)).sum(-1)
    if manifest.task not in PAIRS and lost.ndim > 1 and "attention_mask" in rows.inputs:
        lost = lost[rows.inputs["attention_mask"] == 1]
    loss = float(lost.mean())
    if not np.isfinite(loss):
        raise WrongOutputsError(
            f"the {manifest.target} package gives no finite numbers on this machine as it ships; it is not kept"
        )
    return max(0.0, loss)


def _two_sided(logits: Floats) -> Floats:
    """A single label [..., 1] beside its absence; several labels as they are."""
    return np.concatenate([logits, np.zeros_like(logits)], -1) if logits.shape[-1] == 1 else logits


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(-1, keepdims=True)
    normed: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normed


def _difference(part: Found, expected: Floats, spread: float) -> tuple[float, str]:
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
