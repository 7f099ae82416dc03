"""What the output check (output_check.py) runs of a package with an encoder and a decoder.

sources   two texts of unequal length, padded; or one row of features.  Each has two answers, which are random
runs      whole answers of all rows; answers that begin together and go on token by token, at each of which the two
          rows of a source change places, as beams do; one answer in two pieces, then token by token
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from roundexport.formats.package import PackageManifest
    from roundexport.model.checkpoint import Checkpoint
    from roundexport.runtime.seq2seq_package import Seq2SeqPackage

ANSWER = "decoder_input_ids"
_BEAMS, _STEPS, _SHORTER = 2, 3, 7
_SPEECH = "input_features"


def pair_inputs(
    manifest: PackageManifest, checkpoint: Checkpoint, usual: NDArray[np.int64], length: int, seed: int
) -> dict[str, NDArray[Any]]:
    """Arguments of the model's forward, one row for each answer.

    Args:
        manifest: the package's description.
        checkpoint: the float model.
        usual: token ids to choose from.
        length: tokens of an answer, and of the longer text.
        seed: of what is random.
    """
    generator = np.random.default_rng(seed)
    config = checkpoint.config
    if manifest.task == "transcribe":
        frames = 2 * int(config["max_source_positions"])
        features = generator.standard_normal((1, int(config["num_mel_bins"]), frames)).astype(np.float32)
        inputs: dict[str, NDArray[Any]] = {_SPEECH: features}
    else:
        mask = (np.arange(length) < np.array([length, max(1, length - _SHORTER)])[:, None]).astype(np.int64)
        ids = np.where(mask == 1, generator.choice(usual, mask.shape), manifest.tokens["pad"] or 0)
        inputs = {"input_ids": ids, "attention_mask": mask}
    repeated = {name: np.repeat(values, _BEAMS, 0) for name, values in inputs.items()}
    rows = len(next(iter(repeated.values())))
    return {**repeated, ANSWER: generator.choice(usual, (rows, length))}


def pair_runs(
    package: Seq2SeqPackage, inputs: Mapping[str, NDArray[Any]]
) -> Iterator[tuple[str, int, int, NDArray[np.float32]]]:
    """Name of the run, row, first position and logits [n, V] of everything that the package gives."""
    answers = inputs[ANSWER]
    rows, length = answers.shape
    source = {name: values[::_BEAMS] for name, values in inputs.items() if name != ANSWER}
    encoded = package.backend.encode(source)
    with package.backend.start(encoded, _BEAMS) as session:
        for row, values in enumerate(session.step(answers)):
            yield "whole answers", row, 0, values
    begun = max(1, length - _STEPS)
    with package.backend.start(encoded, _BEAMS) as session:
        place, run = np.arange(rows), "answers token by token, whose rows change places"
        for row, values in enumerate(session.step(answers[:, :begun])):
            yield run, row, begun - 1, values[-1:]
        order = np.arange(rows) ^ 1
        for at in range(begun, length):
            place = place[order]
            for row, values in enumerate(session.step(answers[place, at : at + 1], order.tolist())):
                yield run, int(place[row]), at, values
    first = package.backend.encode({name: values[:1] for name, values in source.items()})
    with package.backend.start(first) as session:
        cuts = [0, max(1, length // 3), *range(begun, length + 1)]
        for start, end in pairwise(cuts):
            if end > start:
                yield "an answer in pieces", 0, start, session.step(answers[:1, start:end])[0]
