"""Guessing how an answer goes on, without a model of its own or with a smaller package.

Prompt lookup: text repeats itself (names, code, quotations from the prompt).  Where the last n tokens of a row stood
before, what followed them there is the guess; n from ``longest`` down to ``shortest``, the latest place first.

A draft package writes its own greedy answer in a session of its own, whose row follows the row that it drafts for.

A guess is kept only where the sampler would have chosen it, so the text depends on guesses no more than the logits do.
With ``precise`` not one token of 50 prompts changes (tests/runtime/test_drafting.py).  As shipped, a run of several
tokens differs from runs of one by more than the order of sums (activations are int8), and a near tie may fall the other
way.  SmolLM2-135M's greedy answers of 16 tokens to 50 prompts, with prompt lookup, one thread, by
``samples/drafting_gain.py PACKAGE --tokens 16 [--precise]``:

    onnx       as shipped 37 the same, 1.15 tokens a run, 1.03 times the tokens/s     precise 50, 1.16, 1.15 times
    openvino   as shipped 44 the same, 1.13 tokens a run, 1.04 times the tokens/s     precise 50, 1.16, 1.00 times

Source: Saxena, Prompt Lookup Decoding (2023); Leviathan et al., Fast Inference from Transformers via Speculative
Decoding (2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from roundexport.errors import UnsupportedError, UsageError

from .types import DecoderBackend


class PromptLookup:
    """Guesses from the row itself.

    Args:
        count: tokens per guess.
        longest: tokens that must have stood before, at first.
        shortest: and at last.
        window: tokens of the row that are searched, from its end.
    """

    def __init__(self, count: int = 8, longest: int = 4, shortest: int = 2, window: int = 4096) -> None:
        if not (count >= 1 and longest >= shortest >= 1):
            raise UsageError(
                f"prompt lookup needs count ≥ 1 and longest ≥ shortest ≥ 1, not {count, longest, shortest}"
            )
        self._count, self._longest, self._shortest, self._window = count, longest, shortest, window

    def guess(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        """At most so many tokens behind these; empty where nothing stood before."""
        row = np.asarray(tokens[-self._window :], np.int64)
        for length in range(min(self._longest, len(row) - 1), self._shortest - 1, -1):
            windows = np.lib.stride_tricks.sliding_window_view(row[:-1], length)
            places = np.flatnonzero((windows == row[-length:]).all(1))
            if len(places):
                start = int(places[-1]) + length
                return row[start : start + min(most, self._count)].tolist()  # type: ignore[no-any-return]
        return []


class DraftModel:
    """Guesses with a smaller decoder that has the same vocabulary.

    Args:
        backend: the opened draft package.
        max_context: most tokens of its rows.
        count: tokens per guess.
        vocabulary: tokens that may be guessed; None: all of its own.

    Raises:
        UnsupportedError: the draft's rows cannot be cut back.
    """

    def __init__(
        self, backend: DecoderBackend, max_context: int, count: int = 5, vocabulary: int | None = None
    ) -> None:
        self._session = backend.start()
        if not self._session.cuts:
            self._session.close()
            raise UnsupportedError(
                "the draft's layers carry a state that cannot be cut back, so it cannot follow an answer; "
                "use another draft"
            )
        [self._row] = self._session.add()
        self._held: list[int] = []  # the tokens in its row
        self._max_context = max_context
        self._count = count
        self._vocabulary = vocabulary

    def guess(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        """At most so many tokens behind these; empty where the draft's context ends."""
        count = min(most, self._count, self._max_context - len(tokens))
        if count < 1:
            return []
        same = next((i for i, (a, b) in enumerate(zip(self._held, tokens, strict=False)) if a != b), None)
        same = min(len(self._held), len(tokens)) if same is None else same
        same = min(same, len(tokens) - 1)
        self._session.cut(self._row, same)
        found: list[int] = []
        new = list(tokens[same:])
        while True:
            found.append(int(self._session.extend({self._row: new})[0, : self._vocabulary].argmax()))
            if len(found) == count:
                break
            new = found[-1:]
        self._held = [*tokens, *found[:-1]]
        return found
