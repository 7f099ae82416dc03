"""Idefics3: positions of patches are looked up by their share of the picture; all patches are seen, so these are fixed.

position(row, column) = bucket(row / rows) · side + bucket(column / columns)      bucket: of side equal parts
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .interface import Architecture, Trace


def forward(embeddings: Any, trace: Trace, pixel_values: Tensor, patch_attention_mask: Tensor | None = None) -> Tensor:
    """In place of Idefics3VisionEmbeddings.forward."""
    rows, columns = (int(size) // embeddings.patch_size for size in pixel_values.shape[-2:])
    side = embeddings.num_patches_per_side
    places = _buckets(rows, side)[:, None] * side + _buckets(columns, side)[None]
    patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
    found: Tensor = patches + embeddings.position_embedding(torch.tensor(places.reshape(1, -1).tolist()))
    return found


def _buckets(count: int, side: int) -> NDArray[np.int64]:
    """In float32, as transformers computes them."""
    shares = np.arange(count, dtype=np.float32) * np.float32(1 / count)
    edges = np.arange(1 / side, 1.0, 1 / side).astype(np.float32)
    found: NDArray[np.int64] = np.digitize(np.minimum(shares, np.float32(1 - 1e-6)), edges)
    return found


ARCHITECTURE = Architecture({"Idefics3VisionEmbeddings.forward": forward})
