"""Vectors for texts by an encoder that is not in a package: tokenized, run in batches of similar length, pooled.

An integer encoder's last hidden states are codes; they become floats only here, to be pooled as the model's folder says
(formats/embedding_head.py).  Texts are cut where sentence-transformers would cut them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from roundexport.errors import UsageError
from roundexport.formats.embedding_head import EmbeddingHead
from roundexport.kernels import integer_encoder
from roundexport.kernels.integer_encoder import IntegerEncoder
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.positions import max_positions

from . import shifts

Hidden = Callable[[Tensor, Tensor, Tensor], NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Embedder:
    """Texts to vectors.

    Args:
        hidden: last hidden states [B, T, C] of ids, mask and token types [B, T].
        tokenizer: cuts texts, and does not pad.
        head: makes a vector of hidden states.
    """

    hidden: Hidden
    tokenizer: Tokenizer
    head: EmbeddingHead

    @classmethod
    def of(cls, checkpoint: Checkpoint, hidden: Hidden) -> Embedder:
        """An embedder with a checkpoint's tokenizer and pooling.

        Raises:
            UsageError: the folder has no tokenizer.json.
        """
        path = checkpoint.folder / "tokenizer.json"
        if not path.is_file():
            raise UsageError(f"{checkpoint.location}: there is no tokenizer.json")
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        longest = max_positions(checkpoint)
        limits = checkpoint.folder / "sentence_bert_config.json"
        wanted = json.loads(limits.read_text(encoding="utf-8")).get("max_seq_length") if limits.is_file() else None
        tokenizer.enable_truncation(min(x for x in (wanted, longest, 512) if x))
        return cls(hidden, tokenizer, checkpoint.embedding_head())

    @classmethod
    def of_integers(cls, checkpoint: Checkpoint, encoder: IntegerEncoder) -> Embedder:
        """An embedder with an integer encoder, simulated in torch."""
        simulation, last = integer_encoder.Simulation(encoder), encoder.leaving
        return cls.of(checkpoint, lambda *inputs: np.asarray(shifts.values_of(simulation(*inputs), last).numpy()))

    @torch.no_grad()
    def embed(self, texts: Sequence[str], batch_size: int = 32) -> NDArray[np.float32]:
        """Vectors [n, D] of texts."""
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        found: list[tuple[list[int], NDArray[np.float32]]] = []
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            longest = max(len(rows[index]) for index in chosen)
            ids, mask = (torch.zeros(len(chosen), longest, dtype=torch.long) for _ in range(2))
            for at, index in enumerate(chosen):
                ids[at, : len(rows[index])] = torch.tensor(rows[index])
                mask[at, : len(rows[index])] = 1
            hidden = self.hidden(ids, mask, torch.zeros_like(ids))
            found.append((chosen, self.head(np.ascontiguousarray(hidden, np.float32), mask.numpy())))
        vectors = np.concatenate([part for _, part in found])
        again = np.empty_like(vectors)
        again[[index for chosen, _ in found for index in chosen]] = vectors
        return again
