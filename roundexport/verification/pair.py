"""What a package with an encoder and a decoder lost: the same answers, given to the float model and to the package.

    sources    held-out text, in windows; or the features of sounds
    answers    what the float model itself answers, sampled (calibration/answers.py), and given to both token by token

Figures per token of an answer are those of decoder.py, padding left out.  Greedy answers are not compared: where both
models differ once, they answer different questions from there on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from roundexport.calibration.answers import ANSWER, answers_to
from roundexport.errors import UsageError

from .report import DecoderQuality, Figure, Histogram

if TYPE_CHECKING:
    from roundexport.model.checkpoint import Checkpoint
    from roundexport.progress import Progress
    from roundexport.runtime.seq2seq_package import Seq2SeqPackage

_SEED = 20_001
_AT_ONCE = 4


def measure_pair(
    checkpoint: Checkpoint,
    package: Seq2SeqPackage,
    sources: dict[str, NDArray[np.int64] | NDArray[np.float32]],
    length: int,
    shown: Progress,
) -> DecoderQuality:
    """Figures over the answers to sources.

    Args:
        checkpoint: the float model.
        package: the opened package.
        sources: its encoder's inputs, one row each.
        length: tokens of an answer.
        shown: where progress is reported.

    Raises:
        UsageError: fewer than two sources.
    """
    count = len(next(iter(sources.values())))
    if count < 2:
        raise UsageError("a standard error needs two sources; give more or longer text")
    model = checkpoint.load_model()
    given = {name: torch.from_numpy(values) for name, values in sources.items()}
    with shown.stage(f"answers of the float model to {count} sources") as stage:
        answers = answers_to(model, checkpoint, given, length, _SEED, stage.at)
    answers = answers[:, : _longest(answers, checkpoint.tokens["pad"])]
    pad, kl, same, lost, kept = checkpoint.tokens["pad"], [], [], [], []
    with shown.stage(f"comparing {answers.size} tokens") as stage:
        for start in range(0, count, _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            with torch.no_grad():
                inputs = {name: values[part] for name, values in given.items()}
                theirs = model(**inputs, **{ANSWER: torch.from_numpy(answers[part])}).logits
            own = package.logits({name: values[part] for name, values in sources.items()}, answers[part])
            p, q = torch.log_softmax(theirs, -1), torch.log_softmax(torch.from_numpy(own), -1)
            for row, ids in enumerate(torch.from_numpy(answers[part])):
                # Position i answers token i + 1; behind an end of sequence there is padding, which is not answered.
                counts = ids[1:] != pad if pad is not None else torch.ones(len(ids) - 1, dtype=torch.bool)
                a, b, ahead = p[row, :-1][counts], q[row, :-1][counts], ids[1:][counts][:, None]
                kl.append((a.exp() * (a - b)).sum(-1).numpy())
                same.append((a.argmax(-1) == b.argmax(-1)).float().mean().item())
                lost.append(-a.gather(-1, ahead).mean().item())
                kept.append(-b.gather(-1, ahead).mean().item())
            stage.at(min(count, start + _AT_ONCE) / count)
    every, means = np.concatenate(kl), np.array([values.mean() for values in kl])
    before, after = Figure.over(np.array(lost)), Figure.over(np.array(kept))
    return DecoderQuality(
        windows=count,
        tokens=int(every.size),
        kl=Figure.over(means),
        kl_p99=float(np.quantile(every, 0.99)),
        kl_max=float(every.max()),
        top1=Figure.over(np.array(same)),
        perplexity_float=float(np.exp(before.mean)),
        perplexity=float(np.exp(after.mean)),
        nll_float=before,
        nll=after,
        first_divergence=(),
        divergence_horizon=0,
        kl_histogram=Histogram.over(every),
        kl_windows=tuple(means.tolist()),
    )


def _longest(answers: NDArray[np.int64], pad: int | None) -> int:
    """Tokens up to the last one that is not padding in any answer."""
    used = np.flatnonzero((answers != pad).any(0))
    return int(used[-1]) + 1
