"""From hidden states to vectors inside the graph: the modules of formats/embedding_head.py in torch.

    hidden [B, S, H], attention mask [B, S]  ──▶  vectors [B, width]

Rows are padded on the right, as everywhere here.  Matrices of Dense modules are float parameters of the graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from roundexport.formats.embedding_head import Dense, EmbeddingHead, LayerNorm
from roundexport.types import PoolingMode


class PooledOutput(nn.Module):
    """The head of an embedder, to be called behind its model.

    Args:
        head: what it does.
    """

    def __init__(self, head: EmbeddingHead) -> None:
        super().__init__()
        self._modes = head.pool.modes
        self.behind = nn.ModuleList(_module(module) for module in head.behind)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Vectors of hidden states."""
        found = torch.cat([_pooled(hidden, mask, mode) for mode in self._modes], -1)
        for module in self.behind:
            found = module(found)
        return found


class _Dense(nn.Module):
    def __init__(self, dense: Dense) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(dense.weight.T.copy()), requires_grad=False)
        bias = torch.zeros(dense.weight.shape[0]) if dense.bias is None else torch.from_numpy(dense.bias)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.activation = getattr(nn, dense.activation)()
        self._residual = dense.residual
        projection = None if dense.projection is None else torch.from_numpy(dense.projection.T.copy())
        self.projection = None if projection is None else nn.Parameter(projection, requires_grad=False)

    def forward(self, vectors: Tensor) -> Tensor:
        out: Tensor = self.activation(vectors @ self.weight + self.bias)
        if not self._residual:
            return out
        return out + (vectors if self.projection is None else vectors @ self.projection)


class _LayerNorm(nn.Module):
    def __init__(self, norm: LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.from_numpy(values), requires_grad=False) for values in (norm.weight, norm.bias)
        )

    def forward(self, vectors: Tensor) -> Tensor:
        return functional.layer_norm(vectors, (vectors.shape[-1],), self.weight, self.bias, 1e-5)


class _Normalize(nn.Module):
    def forward(self, vectors: Tensor) -> Tensor:
        return vectors / vectors.pow(2).sum(-1, keepdim=True).sqrt().clamp(min=1e-12)


def _module(module: object) -> nn.Module:
    if isinstance(module, Dense):
        return _Dense(module)
    return _LayerNorm(module) if isinstance(module, LayerNorm) else _Normalize()


def _pooled(hidden: Tensor, mask: Tensor, mode: PoolingMode) -> Tensor:
    if mode == "cls":
        return hidden[:, 0]
    seen = mask[:, :, None].to(hidden.dtype)
    if mode == "max":
        return (hidden + (seen - 1) * 1e30).amax(1)
    places = mask.cumsum(-1)[:, :, None].to(hidden.dtype)
    if mode == "last":  # a sum over one token: no indices that a batch of another size would not have
        last = (places == seen.sum(1, keepdim=True)).to(hidden.dtype) * seen
        return (hidden * last).sum(1)
    weights = seen * places if mode == "weightedmean" else seen
    total = weights.sum(1)
    return (hidden * weights).sum(1) / (total.sqrt() if mode == "mean_sqrt_len" else total)
