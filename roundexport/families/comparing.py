"""A package on its runtime, in float32, beside transformers' own model: the largest difference, and where it is.

    decoder            three rows whole; one row whose prompt comes in pieces, then token by token; three prompts of
                       unequal lengths at once, then token by token together
    encoder, head      three rows of unequal lengths, padded; one of them alone

    difference = max |package - model| / std(model)        over everything that is not padding's

A decoder's rows are read by the model once, whole and unpadded: what it says at a place does not depend on what comes
behind, and that is part of what is tried.  Rows are longer than every window and every original length of a rotary
embedding in configurations.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from roundexport.model.block_call import without_cache
from roundexport.model.output_head import output_tensor

if TYPE_CHECKING:
    from roundexport.runtime.generation import Decoder
    from roundexport.runtime.text_package import TextPackage

Ids = NDArray[np.int64]
Floats = NDArray[np.floating]

LENGTH, STEPS = 72, 32  # tokens of a row; of those, the last that come one by one
SHARES = (1.0, 0.7, 0.3)  # lengths of unequal rows
TOGETHER = 4  # steps of unequal rows
_FIRST = 4  # token ids below it are special ones
_SEED = 1

Found = tuple[str, Floats, Floats]
"""A run in words, what the package gave, and what the model gave."""


def difference(package: Decoder | TextPackage, model: nn.Module) -> tuple[float, str]:
    """The largest difference in standard deviations of the model's output, and the run it was found in.

    Args:
        package: opened with ``precise``.
        model: the transformers model of the same weights, in float32.
    """
    from roundexport.runtime.generation import Decoder

    runs = list(_decoder(package, model) if isinstance(package, Decoder) else _encoder(package, model))
    spread = float(np.concatenate([wanted.ravel() for _, _, wanted in runs]).std())
    apart = [(float(np.abs(found - wanted).max()) / spread, run) for run, found, wanted in runs]
    return max(apart, key=lambda pair: (not pair[0] <= np.inf, pair[0]))  # not-a-number above all


def _decoder(package: Decoder, model: nn.Module) -> Iterator[Found]:
    length = min(LENGTH, package.manifest.max_context)
    ids = _random_ids(package.manifest.vocab_size, 3, length)
    wanted = _reference(model, {"input_ids": ids})
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


def _encoder(package: TextPackage, model: nn.Module) -> Iterator[Found]:
    length = min(LENGTH, package.manifest.max_context)
    ids = _random_ids(package.manifest.vocab_size, 3, length)
    mask = (np.arange(length) < np.array([[int(share * length)] for share in SHARES])).astype(np.int64)
    padding = package.manifest.tokens["pad"] or 0
    inputs = {"input_ids": np.where(mask == 1, ids, padding), "attention_mask": mask}
    types = int(getattr(model.config, "type_vocab_size", 1) or 1)
    if types > 1:
        inputs["token_type_ids"] = np.random.default_rng(_SEED + 1).integers(0, types, ids.shape) * mask
    for run, rows in (("three padded rows", slice(0, 3)), ("one row", slice(0, 1))):
        feed = {name: values[rows] for name, values in inputs.items()}
        found, wanted = package.output(feed), _reference(model, feed)
        if wanted.ndim > 2:
            found, wanted = found[feed["attention_mask"] == 1], wanted[feed["attention_mask"] == 1]
        yield run, found, wanted


def _random_ids(vocabulary: int, rows: int, length: int) -> Ids:
    return np.random.default_rng(_SEED).integers(_FIRST, vocabulary, (rows, length))


@torch.no_grad()
def _reference(model: nn.Module, inputs: dict[str, Ids]) -> Floats:
    given: dict[str, Any] = {name: torch.from_numpy(values) for name, values in inputs.items()}
    return output_tensor(model(**given, **without_cache(model))).numpy()
