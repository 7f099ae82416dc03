"""Opaque operators that stand in a model's graph for what a target lowers by itself, and the swaps that put them there.

`torch.export` then sees the model's own arithmetic with these nodes in place of linears, embeddings, attention, rotary
embedding and RMS norms; no large weight is in the graph.  Names travel as integers: every front end reads those.

    roundexport::linear(x, index, out_features)      y [..., N], bias included; index into Capture.linears
    roundexport::grouped_linear(x, counts, index, out_features)     experts, see experts.py
    roundexport::embedding(ids, index, width)        rows [..., K] of a table; index into Capture.embeddings
    roundexport::attention(q, k, v, mask, bias, sinks, index, scale, window, softcap, causal)         -> [B, H, S, Dv]
        q [B, H, S, D]; k, v [B, Hkv, S, D] of the NEW tokens only; mask is the 2-D attention mask [B, T], None where
        nothing is hidden; bias is an additive position bias or None; sinks [H] or None is one more score for each head,
        of a key without a value; a key is visible at distance < window (-1: all); softcap 0 means none
    roundexport::rope(x, cos, sin, index, interleaved)              see rotary.py
    roundexport::rms_norm(x, weight, eps)            x / sqrt(mean(x²) + eps) · weight over the last axis

Norms are recognized by value, not by class name: the original is run beside the formula on random input, and only where
both agree does the placeholder take its place.  What does not agree stays plain operators.

Source: torch.library custom operators with a fake implementation that gives only shapes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from roundexport.model._patches import function_in
from roundexport.quant.spec import LinearInfo


def define(schema: str, shape_only: Callable[..., Any]) -> None:
    """Make an opaque operator of which only the shape of the output is known."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, shape_only, "Meta")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, shape_only, "CPU")  # type: ignore[no-untyped-call]


_LIBRARY = torch.library.Library("roundexport", "DEF")  # type: ignore[no-untyped-call]
define(
    "linear(Tensor x, int index, int out_features) -> Tensor",
    lambda x, index, out_features: x.new_empty(*x.shape[:-1], out_features),
)
define(
    "embedding(Tensor ids, int index, int width) -> Tensor",
    lambda ids, index, width: ids.new_empty(*ids.shape, width, dtype=torch.float32),
)
define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? sinks, int index, float scale, "
    "int window, float softcap, bool causal) -> Tensor",
    lambda q, k, v, mask, bias, sinks, index, scale, window, softcap, causal: q.new_empty(*q.shape[:-1], v.shape[-1]),
)
define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", lambda x, weight, eps: torch.empty_like(x))
ATTENTION, RMS_NORM = torch.ops.roundexport.attention.default, torch.ops.roundexport.rms_norm.default


AttentionKind = Literal["plain", "cached", "cross"]
"""Where keys come from: the same tokens; a cache and the new tokens; another model half, whole (cross-attention)."""


@dataclass(frozen=True)
class AttentionInfo:
    """One attention layer: what its KV cache and its kernel need to know.

    ``cache`` is what its cache is called by; ``chunk`` 0 is attention without chunks.
    """

    index: int
    kind: AttentionKind
    cache: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int
    softcap: float
    causal: bool
    chunk: int = 0


@dataclass
class Swaps:
    """What was swapped in one model; filled while the model is prepared and traced."""

    linears: list[LinearInfo] = field(default_factory=list)
    biased: set[str] = field(default_factory=set)
    transposed: set[str] = field(default_factory=set)
    embeddings: list[LinearInfo] = field(default_factory=list)
    groups: list[tuple[tuple[int, ...], ...]] = field(default_factory=list)
    attentions: dict[int, AttentionInfo] = field(default_factory=dict)
    ropes: int = 0


def _no_values(rows: int) -> nn.Parameter:
    """A ``weight`` for models that look at its type and its number of rows; it has no values."""
    return nn.Parameter(torch.empty(rows, 0), requires_grad=False)


class _Linear(nn.Module):
    """Stand-in for a linear."""

    def __init__(self, index: int, out_features: int) -> None:
        super().__init__()
        self.index, self.out_features = index, out_features
        self.weight = _no_values(out_features)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.roundexport.linear(x, self.index, self.out_features)  # type: ignore[no-any-return]


class _Embedding(nn.Module):
    def __init__(self, index: int, rows: int, width: int, scale: float) -> None:
        super().__init__()
        self.index, self.width, self.scale = index, width, scale
        self.weight = _no_values(rows)

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = torch.ops.roundexport.embedding(ids, self.index, self.width)
        return rows if self.scale == 1.0 else rows * self.scale


class _RmsNorm(nn.Module):
    def __init__(self, weight: Tensor | None, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = None if weight is None else nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.ones(x.shape[-1]) if self.weight is None else self.weight
        return torch.ops.roundexport.rms_norm(x, weight, self.eps)  # type: ignore[no-any-return]


def swap_weights(model: nn.Module, swaps: Swaps, whole: tuple[str, ...] = ()) -> None:
    """Replace every linear, Conv1D and embedding by its placeholder, in the order of ``named_modules``.

    Args:
        model: the model.
        swaps: filled.
        whole: last names of embeddings and linears that keep their weight, as the model uses it as a matrix.
    """
    for name, module in list(model.named_modules()):
        read = name.rpartition(".")[2] in whole or _is_read(model, name)
        if isinstance(module, nn.Linear) and (read or not _is_linear(module)):
            module.to_empty(device="cpu", recurse=False)  # a router that is a linear and more: stays, with its weight
            continue
        if isinstance(module, nn.Linear | Conv1D):
            rows, columns = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
            if module.bias is not None:
                swaps.biased.add(name)
            if isinstance(module, Conv1D):
                swaps.transposed.add(name)
            replacement: nn.Module = _Linear(len(swaps.linears), rows)
            swaps.linears.append(LinearInfo(name, columns, rows))
        elif isinstance(module, nn.Embedding):
            rows, columns = module.weight.shape
            if read:
                module.weight = nn.Parameter(torch.empty(rows, columns), requires_grad=False)
                continue
            scale = _constant_scale(module)
            replacement = _own_lookup(module, len(swaps.embeddings), columns)
            if scale is not None:
                replacement = _Embedding(len(swaps.embeddings), rows, columns, scale)
            swaps.embeddings.append(LinearInfo(name, columns, rows, "embedding"))
        else:
            continue
        model.set_submodule(name, replacement)


def _is_read(model: nn.Module, name: str) -> bool:
    """Whether torch's own attention reads the linear's weight itself, instead of calling it."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)


def _is_linear(module: nn.Linear) -> bool:
    """Whether a subclass of Linear, whose forward may be its own (Falcon's is), gives what a linear gives."""
    if type(module).forward is nn.Linear.forward:
        return True
    plain, own = nn.Linear(4, 3, bias=module.bias is not None), nn.Linear(1, 1)
    vars(own).update(vars(plain))
    own.__class__ = type(module)
    x = torch.arange(8.0).reshape(2, 4)
    try:
        found = own(x)
    except (AttributeError, TypeError, RuntimeError):  # it reads attributes that the probe lacks
        return False
    return isinstance(found, Tensor) and torch.allclose(found, plain(x), atol=1e-5)


def _own_lookup(module: nn.Embedding, index: int, width: int) -> nn.Embedding:
    """The module itself, whose own forward computes which rows it wants; the lookup inside is `embedding_lookups`'."""
    module.weight = _no_values(module.num_embeddings)
    module.placeholder = (index, width)  # type: ignore[assignment]
    return module


@contextmanager
def embedding_lookups() -> Iterator[None]:
    """Inside this block a lookup in an embedding that kept its own forward is the placeholder."""
    original = nn.Embedding.forward

    def lookup(self: nn.Embedding, ids: Tensor) -> Tensor:
        if "placeholder" not in vars(self):
            return original(self, ids)
        index, width = vars(self)["placeholder"]
        return torch.ops.roundexport.embedding(ids, index, width)  # type: ignore[no-any-return]

    with function_in(nn.Embedding, "forward", lookup):
        yield


def _constant_scale(module: nn.Embedding) -> float | None:
    """The constant that rows are multiplied with, 1 but for Gemma; None: the module does something else."""
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    probe = torch.nn.Embedding(4, module.embedding_dim)
    original, module.weight = module.weight, nn.Parameter(probe.weight.detach().clone())
    module.num_embeddings = 4
    try:
        with torch.no_grad():
            ratio = (module(torch.arange(4)) / probe.weight).flatten()
    except (IndexError, TypeError, ValueError, RuntimeError):
        ratio = torch.tensor([0.0, 1.0])  # it takes other arguments, or reads other rows than it was asked for
    module.weight, module.num_embeddings = original, original.shape[0]
    if not torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-5):
        return None
    return float(ratio.median())


def swap_norms(model: nn.Module) -> None:
    """Replace modules that compute an RMS norm by the placeholder, those that compute a layer norm by torch's own.

    Found by comparing values, so that a norm of any class is one operator in a runtime: with the weight as it is, with
    one added, or without a weight.
    """
    for name, module in list(model.named_modules()):
        weights = list(module.parameters(recurse=False))
        if len(weights) > 1 or any(w.ndim != 1 or w.numel() == 0 for w in weights) or list(module.children()):
            continue
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(eps, int | float) or isinstance(module, _Linear | _Embedding | nn.LayerNorm):
            continue
        if len(inspect.signature(module.forward).parameters) > 1:
            continue  # Mamba's take a gate, too
        found = _norm(module, weights[0].detach() if weights else None, float(eps))
        if found is not None:
            model.set_submodule(name, found)


def _norm(module: nn.Module, weight: Tensor | None, eps: float) -> nn.Module | None:
    """The module that stands in for a norm; None where none gives what it gives."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 8 if weight is None else weight.numel(), generator=generator)
    try:
        expected = module(x)
    except (TypeError, ValueError, RuntimeError):
        return None
    if not isinstance(expected, Tensor):
        return None
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    for candidate in [None] if weight is None else [weight, 1.0 + weight]:
        given = normed if candidate is None else normed * candidate
        if torch.allclose(given, expected, rtol=1e-5, atol=1e-6):
            return _RmsNorm(None if candidate is None else candidate.clone(), eps)
    if weight is None or not torch.allclose(_layer_norm(x, weight, eps), expected, rtol=1e-5, atol=1e-6):
        return None
    plain = nn.LayerNorm(weight.numel(), eps=eps, bias=False)
    plain.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return plain


def _layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return nn.functional.layer_norm(x, weight.shape, weight, None, eps)
