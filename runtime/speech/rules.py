"""Which tokens Whisper may write next: what is suppressed, and how times come.

Some tokens are never written (``suppress``: signs, musical notes, control tokens), some not as the first one
(``begin_suppress``: the end, a blank).  Where times are asked for:

    - the first token is a time, not later than ``latest_start``;
    - times come in pairs, the end of one segment and the beginning of the next, and before the end of the transcript;
    - they do not go back, and a segment does not end where it began;
    - where all times together are likelier than the likeliest word, a time is written:  ln Σ e^(z_time) > max z_word.

`Rules.scores` gives the logits with −∞ for what may not come.

Source: transformers' WhisperTimeStampLogitsProcessor; whisper/decoding.py of https://github.com/openai/whisper (MIT).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from roundexport.runtime.types import Floats

from .tokens import SpeechTokens


class Rules:
    """The rules of one model for one way of writing.

    Args:
        tokens: the model's special tokens.
        end: the token that ends a transcript; words are those before it.
        timestamps: whether times are written.
    """

    def __init__(self, tokens: SpeechTokens, end: int, timestamps: bool) -> None:
        self._tokens = tokens
        self._end = end
        self._timestamps = timestamps
        self._never = np.array(tokens.begin.suppress, np.int64)
        self._not_first = np.array(tokens.begin.begin_suppress, np.int64)

    def scores(self, written: Sequence[int], logits: Floats) -> Floats:
        """Logits [V] of the next token after those written, −∞ where it may not come.

        Args:
            written: tokens after the prompt.
            logits: [V], which are left as they are.
        """
        scores = logits.copy()
        if not written:
            scores[self._not_first] = -np.inf
        scores[self._never] = -np.inf
        if self._timestamps:
            self._times(written, scores)
        return scores

    def _times(self, written: Sequence[int], scores: Floats) -> None:
        tokens, times = self._tokens, self._tokens.times
        scores[tokens.no_timestamps] = -np.inf
        ended = bool(written) and written[-1] >= times
        paired = ended and (len(written) < 2 or written[-2] >= times)
        if paired:
            scores[times:] = -np.inf
        elif ended:
            scores[: self._end] = -np.inf
        last = next((token for token in reversed(written) if token >= times), None)
        if last is not None:
            scores[times : last if ended and not paired else last + 1] = -np.inf
        if not written:
            scores[:times] = -np.inf
            if tokens.latest_start is not None:
                scores[times + tokens.latest_start + 1 :] = -np.inf
        best = scores[times:].max()
        if best > -np.inf and best + np.log(np.exp(scores[times:] - best).sum()) > scores[:times].max():
            scores[:times] = -np.inf
