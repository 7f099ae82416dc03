"""How much a sentence's vector moves with an error in the hidden states before the first block: a metric for tables.

Half of a small encoder's weights are its table of tokens.  A row of it is no linear's weight: no inputs tell which of
its errors matter.  What tells is the model behind it.  With s the sum of a token's rows and y the sentence's
vector (the mean of the last hidden states, at length 1),

    M = mean over tokens of E_u [g gᵀ],   g = ∂(u · y) / ∂s,   u random, so that E_u [g gᵀ] = JᵀJ

and a row's error δ costs δ M δᵀ.  That is the loss of a weight in Gram space with M in H's place, so a table is rounded
as a linear is (algorithms/rounding/gram.py): errors are led to directions that the model does not look at, among them
the two that a norm cannot see.

Nothing is trained: a few backward passes over the calibration tokens.  In: a float encoder, ids [S, T].  Out: M [C, C].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .float_encoder import FloatEncoder

_SAMPLES = 64
_BATCH = 16
_SEED = 20


def of_embeddings(encoder: FloatEncoder, ids: NDArray[np.int64]) -> Tensor:
    """M, float32 [C, C], over the first 64 samples."""
    chosen = torch.from_numpy(ids[:_SAMPLES])
    generator = torch.Generator().manual_seed(_SEED)
    found: Any = 0
    for start in range(0, len(chosen), _BATCH):
        part = chosen[start : start + _BATCH]
        with torch.enable_grad():
            summed = encoder.summed(part, torch.zeros_like(part)).requires_grad_(True)
            x, mask = encoder.after_sum(summed), torch.ones(part.shape)
            for index in range(encoder.layers):
                x = encoder.run_block(index, x, mask)
            vectors = torch.nn.functional.normalize(x.mean(1), dim=1)
            along = (vectors * torch.randn(vectors.shape, generator=generator)).sum()
        gradient = torch.autograd.grad(along, summed)[0].flatten(0, 1)
        found = found + gradient.t() @ gradient
    metric: Tensor = found / chosen.numel()
    return metric / metric.diagonal().mean()
