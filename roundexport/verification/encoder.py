"""What an encoder package lost: embeddings of the float model and of the package on its own runtime, of the same texts.

Cosine between both embeddings of a text (mean, least), Spearman's rank correlation of all pairwise similarities, and
the share of texts whose nearest neighbor stays the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from roundexport.model.checkpoint import Checkpoint

from .report import EncoderQuality, Figure

if TYPE_CHECKING:
    from roundexport.runtime.types import EncoderEngine


def measure_encoder(checkpoint: Checkpoint, engine: EncoderEngine, texts: list[str]) -> EncoderQuality:
    """Figures of an encoder package over texts."""
    return compare_vectors(float_embeddings(checkpoint, engine, texts), engine.embed(texts))


def compare_vectors(reference: NDArray[np.float32], found: NDArray[np.float32]) -> EncoderQuality:
    """Figures over vectors [n, D] of the float model and of the package."""
    unit = [e / np.linalg.norm(e, axis=1, keepdims=True) for e in (reference, found)]
    cosine = (unit[0] * unit[1]).sum(1)
    similar = [u @ u.T for u in unit]
    upper = np.triu_indices(len(found), 1)
    neighbor = [np.where(np.eye(len(found), dtype=bool), -2.0, s).argmax(1) for s in similar]
    ranks = [s[upper].argsort().argsort().astype(np.float64) for s in similar]
    return EncoderQuality(
        texts=len(found),
        cosine=Figure.over(cosine),
        cosine_min=float(cosine.min()),
        rank_correlation=float(np.corrcoef(*ranks)[0, 1]),
        same_neighbour=float((neighbor[0] == neighbor[1]).mean()),
    )


def float_embeddings(checkpoint: Checkpoint, engine: EncoderEngine, texts: list[str]) -> NDArray[np.float32]:
    """Embeddings [n, width] of the float model, tokenized exactly as the engine does."""
    import torch

    model, head = checkpoint.load_model(), checkpoint.embedding_head()
    rows = []
    for text in texts:
        inputs = engine.encode([text])
        with torch.no_grad():
            out = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        rows.append(head(out.last_hidden_state.numpy(), inputs["attention_mask"])[0])
    return np.stack(rows)
