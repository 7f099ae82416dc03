"""Samples for an encoder, which cannot write: words drawn from its vocabulary by Zipf's law.

    p(rank) ∝ 1/(rank + 2.7)        ranks by token id, as vocabularies list frequent pieces first

Special tokens and placeholders are left out; every sample is framed as the tokenizer frames a text.
Source of the constant: Mandelbrot's 2.7 for English words; what it buys is in docs/lab-notes.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import UsageError

from .text import encoder_of, frame

if TYPE_CHECKING:
    from roundexport.model.checkpoint import Checkpoint

Ids = NDArray[np.int64]

_ZIPF_SHIFT = 2.7


def vocabulary_samples(checkpoint: Checkpoint, num_samples: int, length: int, seed: int) -> Ids:
    """Samples of random words.

    Args:
        checkpoint: the encoder, whose tokenizer.json is read.
        num_samples: rows.
        length: tokens per row, special tokens included.
        seed: of the drawing.

    Returns:
        int64 [num_samples, length].

    Raises:
        UsageError: there is no vocabulary to draw from.
    """
    before, after = frame(encoder_of(checkpoint))
    ids = _word_ids(checkpoint)
    weights = 1 / (np.arange(len(ids)) + _ZIPF_SHIFT)
    drawn = np.random.default_rng(seed).choice(
        ids, (num_samples, length - len(before) - len(after)), p=weights / weights.sum()
    )
    framed = [np.tile(np.array(part, np.int64), (num_samples, 1)) for part in (before, after)]
    return np.concatenate([framed[0], drawn, framed[1]], axis=1)


def _word_ids(checkpoint: Checkpoint) -> Ids:
    """Ids of ordinary tokens, ascending: neither special nor placeholders such as [unused7]."""
    path = checkpoint.folder / "tokenizer.json"
    if not path.is_file():
        raise UsageError(
            "calibration self: an encoder without tokenizer.json has no vocabulary to draw from; give text"
        )
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    ordinary = (i for i in sorted(vocabulary) if i not in special and not vocabulary[i].startswith("[unused"))
    return np.fromiter(ordinary, np.int64)
