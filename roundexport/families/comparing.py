"""A package on its runtime, in float32, beside transformers' own model: the largest difference, and where it is.

    decoder            three rows whole; one row whose prompt comes in pieces, then token by token; three prompts of
                       unequal lengths at once, then token by token together
    encoder, head      three rows of unequal lengths, padded; one of them alone
    sounds             three of one length, one, and one that is cut short
    images             three of them, and one; hidden states or scores, and the vector beside them
    two halves         the runs of targets/pair_outputs.py, beams that change places among them

    difference = max |package - model| / std(model)        over everything that is not padding's
    own        = the same of the model in float32 and in float64, on the same inputs (float64.py)

A decoder's rows are read by the model once, whole and unpadded: what it says at a place does not depend on what comes
behind, and that is part of what is tried.  Rows are longer than every window and every original length of a rotary
embedding in configurations.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from roundexport.model.block_call import without_cache
from roundexport.model.output_head import told_tensor
from roundexport.targets.pair_outputs import pair_runs

from .float64 import in_float64, widened

if TYPE_CHECKING:
    from roundexport.runtime.frame_transcription import FrameTranscriber
    from roundexport.runtime.generation import Decoder
    from roundexport.runtime.image_package import ImagePackage
    from roundexport.runtime.seq2seq_package import Seq2SeqPackage
    from roundexport.runtime.text_package import TextPackage

    Package = Decoder | TextPackage | ImagePackage | FrameTranscriber | Seq2SeqPackage

Ids = NDArray[np.int64]
Floats = NDArray[np.floating]

LENGTH, STEPS = 72, 32  # tokens of a row; of those, the last that come one by one
SHARES = (1.0, 0.7, 0.3)  # lengths of unequal rows
TOGETHER = 4  # steps of unequal rows
_FIRST = 4  # token ids below it are special ones
_SEED = 1

Found = tuple[str, Floats, Floats]
"""A run in words, what the package gave, and what the model gave."""


@dataclass(frozen=True)
class Difference:
    """What a package and its model differ by, in standard deviations of the model's output.

    Args:
        largest: of package and model.
        where: the run it was found in.
        own: of the model in float32 and itself in float64.
    """

    largest: float
    where: str
    own: float


class _Model:
    """The model in float32, which remembers what it was asked and what it said."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self._told: list[tuple[dict[str, Tensor], bool, Floats]] = []

    def __call__(self, inputs: Mapping[str, NDArray[Any]], vector: bool = False) -> Floats:
        given = {name: torch.from_numpy(values) for name, values in inputs.items()}
        told = self._run(given, vector)
        self._told.append((given, vector, told))
        return told

    def own_error(self) -> float:
        """The largest that its answers so far are away from what it says in float64."""
        with in_float64(self.model):
            exact = [self._run(widened(given), vector) for given, vector, _ in self._told]
        spread = np.concatenate([values.ravel() for values in exact]).std()
        apart = [np.abs(told - values).max() for (_, _, told), values in zip(self._told, exact, strict=True)]
        return float(max(apart) / spread)

    @torch.no_grad()
    def _run(self, given: Mapping[str, Tensor], vector: bool) -> Floats:
        arguments: dict[str, Any] = {**given, **without_cache(self.model)}
        return told_tensor(self.model(**arguments), vector).numpy()


def difference(package: Package, model: nn.Module, inputs: Mapping[str, NDArray[Any]] | None = None) -> Difference:
    """The largest difference of a package and its model, and the model's own error on the same inputs.

    Args:
        package: opened with ``precise``.
        model: the transformers model of the same weights, in float32; one at a time.
        inputs: of a package with two halves, of images or of sounds, what goes in: their arguments by name.
    """
    asked = _Model(model)
    runs = list(_runs(package, asked, inputs or {}))
    spread = float(np.concatenate([wanted.ravel() for _, _, wanted in runs]).std())
    apart = [(float(np.abs(found - wanted).max()) / spread, run) for run, found, wanted in runs]
    largest, where = max(apart, key=lambda pair: (not pair[0] <= np.inf, pair[0]))  # not-a-number above all
    return Difference(largest, where, asked.own_error())


def _runs(package: Package, model: _Model, inputs: Mapping[str, NDArray[Any]]) -> Iterator[Found]:
    from roundexport.runtime.frame_transcription import FrameTranscriber
    from roundexport.runtime.generation import Decoder
    from roundexport.runtime.image_package import ImagePackage
    from roundexport.runtime.seq2seq_package import Seq2SeqPackage

    if isinstance(package, FrameTranscriber):
        return _sounds(package, model, inputs)
    if isinstance(package, Decoder):
        return _decoder(package, model)
    if isinstance(package, Seq2SeqPackage):
        return _halves(package, model, inputs)
    return _images(package, model, inputs) if isinstance(package, ImagePackage) else _encoder(package, model)


def _halves(package: Seq2SeqPackage, model: _Model, inputs: Mapping[str, NDArray[Any]]) -> Iterator[Found]:
    wanted = model(inputs)
    for run, row, start, found in pair_runs(package, inputs):
        yield f"{run}, row {row + 1} from token {start + 1}", found, wanted[row, start : start + len(found)]


def _sounds(package: FrameTranscriber, model: _Model, inputs: Mapping[str, NDArray[Any]]) -> Iterator[Found]:
    whole, (name,) = inputs[next(iter(inputs))], inputs
    for run, samples in (("three sounds", whole), ("one sound", whole[:1]), ("a short one", whole[1:2, :-333])):
        feed = {name: np.ascontiguousarray(samples)}
        yield run, package.output(feed), model(feed)


def _images(package: ImagePackage, model: _Model, inputs: Mapping[str, NDArray[Any]]) -> Iterator[Found]:
    alone = {name: values[:1] for name, values in inputs.items()}
    yield "three images", package.output(inputs), model(inputs)
    yield "one image", package.output(alone), model(alone)
    if package.manifest.pooling is not None and package.manifest.pooling["mode"] == "head":
        yield "vectors of three images", package.output(inputs, True), model(inputs, True)


def _decoder(package: Decoder, model: _Model) -> Iterator[Found]:
    length = min(LENGTH, package.manifest.max_context)
    ids = _random_ids(package.manifest.vocab_size, 3, length)
    wanted = model({"input_ids": ids})
    yield "whole prompts", package.logits(ids), wanted
    prompt = length - min(STEPS, length // 2)  # some packages serve short texts alone
    with package.start(rows=1) as session:
        (row,) = session.add(1)
        pieces = [0, prompt // 4, prompt // 4 * 3, prompt]
        for begin, end in pairwise(pieces):
            found = session.extend({row: ids[0, begin:end].tolist()}).copy()
            yield f"a prompt in pieces, tokens {begin} to {end}", found, wanted[:1, end - 1]
        for place in range(prompt, length):
            found = session.extend({row: [int(ids[0, place])]}).copy()
            yield f"one token at a time, token {place}", found, wanted[:1, place]
    ends = [max(1, int(share * prompt)) for share in SHARES]
    with package.start(rows=3) as session:
        rows = session.add(3)
        new = {row: ids[number, : ends[number]].tolist() for number, row in enumerate(rows)}
        for step in range(TOGETHER + 1):
            found = session.extend(new).copy()
            places = [end + step for end in ends]
            at = np.stack([wanted[number, place - 1] for number, place in enumerate(places)])
            yield f"three unequal rows, step {step}", found, at
            new = {row: [int(ids[number, places[number]])] for number, row in enumerate(rows)}


def _encoder(package: TextPackage, model: _Model) -> Iterator[Found]:
    length = min(LENGTH, package.manifest.max_context)
    ids = _random_ids(package.manifest.vocab_size, 3, length)
    mask = (np.arange(length) < np.array([[int(share * length)] for share in SHARES])).astype(np.int64)
    padding = package.manifest.tokens["pad"] or 0
    inputs = {"input_ids": np.where(mask == 1, ids, padding), "attention_mask": mask}
    types = int(getattr(model.model.config, "type_vocab_size", 1) or 1)
    if types > 1:
        inputs["token_type_ids"] = np.random.default_rng(_SEED + 1).integers(0, types, ids.shape) * mask
    for run, rows in (("three padded rows", slice(0, 3)), ("one row", slice(0, 1))):
        feed = {name: values[rows] for name, values in inputs.items()}
        found, wanted = package.output(feed), model(feed)
        if wanted.ndim > 2:
            found, wanted = found[feed["attention_mask"] == 1], wanted[feed["attention_mask"] == 1]
        yield run, found, wanted


def _random_ids(vocabulary: int, rows: int, length: int) -> Ids:
    return np.random.default_rng(_SEED).integers(_FIRST, vocabulary, (rows, length))
