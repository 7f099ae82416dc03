"""What a decoder package lost: the float model and the package on its own runtime, over the same tokens.

Per predicted token, with p the float model's distribution and q the package's:

    KL(p ‖ q) = Σ_v p_v · (log p_v - log q_v)      mean, 99th percentile, maximum, histogram over tokens; nats
    top-1     = share of positions where both models' likeliest token is the same
    perplexity = exp(mean negative log likelihood), for both, with the standard error of the mean taken over windows
    divergence = first position at which greedy decoding of both models differs, over a few prompts

The float model does not have to write for the last one: up to the first difference both have written the same, so it is
shown what the package wrote, and the first token that it finds less likely than another is where it would have left.
That is one forward over the prompts, taken together with the windows (float_model.py). A package that does not fit in
memory writes nothing (sectioned.py), and there is no divergence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roundexport.model.checkpoint import Checkpoint
from roundexport.progress import Progress

from .float_model import CACHE, FloatModel, LogitsOf, States
from .report import DecoderQuality, Figure, Histogram
from .sectioned import SectionedDecoder

if TYPE_CHECKING:
    from roundexport.runtime.types import DecoderEngine
    from roundexport.storage.tensor_cache import TensorCache

Ids = NDArray[np.int64]

HORIZON = 48
"""Tokens of greedy decoding that are compared, where there is room for them."""
_PROMPTS, _PROMPT_LEN = 8, 32
_ENGINE_BYTES = 256 << 20  # logits of the package at a time; one window at least


def measure_decoder(
    checkpoint: Checkpoint,
    engine: DecoderEngine | SectionedDecoder,
    ids: Ids,
    *,
    horizon: int = HORIZON,
    max_context: int | None = None,
    shown: Progress | None = None,
    cache: TensorCache | None = CACHE,
) -> DecoderQuality:
    """Figures of a decoder package over windows of tokens.

    Args:
        checkpoint: the float model.
        engine: the opened package, or one in sections, which writes nothing.
        ids: int64 [windows, length].
        horizon: tokens of greedy decoding compared, from the first 32 tokens of up to eight windows; fewer where
            ``max_context`` has no room for them.
        max_context: tokens that the package takes; None: enough.
        shown: where progress is reported.
        cache: where the float model's answers are remembered; None: nowhere.
    """
    shown = shown or Progress(enabled=False)
    prompts, horizon = _prompts(ids, horizon, max_context)
    written: list[Ids] = []  # one array; none of a package that writes nothing
    if not isinstance(engine, SectionedDecoder):
        with shown.stage(f"writing {horizon} tokens after {len(prompts)} prompts with the package"):
            written = [np.stack(engine.greedy([list(map(int, prompt)) for prompt in prompts], horizon))]
    model = FloatModel(checkpoint, shown, cache)
    windows, *answers = model.states(ids, *(np.concatenate([prompts, own[:, :-1]], 1) for own in written))
    sums = _Sums(ids)
    with shown.stage(f"scoring {ids.size} tokens with the package") as stage, model.logits_of(windows) as logits_of:
        for start, found in _package_logits(engine, ids, logits_of.vocabulary):
            for index, own in enumerate(found, start):
                sums.add(index, logits_of, torch.from_numpy(own))
                stage.at((index + 1) / len(ids))
    if not written:
        return sums.quality((), 0)
    with shown.stage("comparing what the package wrote with what the float model would have written"):
        agreeing = _agreeing(model, answers[0], written[0], prompts.shape[1])
    return sums.quality(agreeing, horizon)


class _Sums:
    """Figures per token, [windows, length] (of likelihoods, [windows, length - 1])."""

    def __init__(self, ids: Ids) -> None:
        self.ids = torch.from_numpy(ids)
        self.kl, self.same = torch.zeros(ids.shape), torch.zeros(ids.shape, dtype=torch.bool)
        self.nll_float, self.nll = (torch.zeros(len(ids), ids.shape[1] - 1) for _ in range(2))

    def add(self, index: int, logits_of: LogitsOf, found: Tensor) -> None:
        """One window, whose logits [S, V] the package gave."""
        for part, logits in logits_of.of_window(index):
            p, q = torch.log_softmax(logits, -1), torch.log_softmax(found[part].float(), -1)
            self.kl[index, part] = (p.exp() * (p - q)).sum(-1)
            self.same[index, part] = p.argmax(-1) == q.argmax(-1)
            targets = self.ids[index, part.start + 1 : part.stop + 1, None]
            ahead = slice(part.start, part.start + len(targets))
            self.nll_float[index, ahead] = -p[: len(targets)].gather(-1, targets)[:, 0]
            self.nll[index, ahead] = -q[: len(targets)].gather(-1, targets)[:, 0]

    def quality(self, first_divergence: tuple[int, ...], horizon: int) -> DecoderQuality:
        """The figures of all windows."""
        kl = self.kl.numpy()
        lost, kept = Figure.over(self.nll_float.numpy().mean(1)), Figure.over(self.nll.numpy().mean(1))
        return DecoderQuality(
            windows=len(kl),
            tokens=int(kl.size),
            kl=Figure.over(kl.mean(1)),
            kl_p99=float(np.quantile(kl, 0.99)),
            kl_max=float(kl.max()),
            top1=Figure.over(self.same.numpy().mean(1)),
            perplexity_float=float(np.exp(lost.mean)),
            perplexity=float(np.exp(kept.mean)),
            nll_float=lost,
            nll=kept,
            first_divergence=first_divergence,
            divergence_horizon=horizon,
            kl_histogram=Histogram.over(kl),
            kl_windows=tuple(kl.mean(1).tolist()),
        )


def _prompts(ids: Ids, horizon: int, max_context: int | None) -> tuple[Ids, int]:
    """Prompts of greedy decoding and the tokens to write: both shorter where the package takes few tokens."""
    room = max_context or 2 * _PROMPT_LEN + horizon
    length = max(1, min(_PROMPT_LEN, ids.shape[1], room // 2))
    return ids[:_PROMPTS, :length], max(1, min(horizon, room - length))


def _package_logits(
    engine: DecoderEngine | SectionedDecoder, ids: Ids, vocabulary: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Index of the first of some windows, and the package's logits [n, S, V] of them."""
    if isinstance(engine, SectionedDecoder):
        yield from ((index, logits[None]) for index, logits in enumerate(engine.windows(ids)))
        return
    size = max(1, _ENGINE_BYTES // (4 * vocabulary * ids.shape[1]))
    for start in range(0, len(ids), size):
        yield start, engine.logits(ids[start : start + size])


def _agreeing(model: FloatModel, answers: States, written: Ids, prompt_len: int) -> tuple[int, ...]:
    """Per prompt, the number of greedy tokens that agree before the first that differs."""
    likeliest = torch.zeros(answers.ids.shape, dtype=torch.int64)
    with model.logits_of(answers) as logits_of:
        for index in range(len(written)):
            for part, logits in logits_of.of_window(index, prompt_len - 1):
                likeliest[index, part] = logits.argmax(-1)
    agree = np.cumprod(likeliest[:, prompt_len - 1 :].numpy() == written, axis=1).sum(1)
    return tuple(int(count) for count in agree)
