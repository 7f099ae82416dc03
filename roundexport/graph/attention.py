"""Attention and its masks, routed through one placeholder, and the proof that the placeholder says what the mask does.

transformers calls an attention function by name with queries, new keys and values and a mask, which another function by
name has made.  Both are ours while a model is traced.  The mask stays the 2-D attention mask: who sees whom is said to
the placeholder by ``causal`` and ``window``, taken from what the layer passes:

    visible(q, k) = (k ≤ q or not causal) and (|q - k| < window or window < 0)

The mask's own rule (transformers builds masks from functions of two positions) is kept, and after the trace held
against this formula at probe positions.  Attention in chunks is transformers' own rule for it, known by its code, since
that reads where a row's padding ends, which is not known while tracing; ``chunk`` tokens from the first one see each
other.  A layer whose mask is another (blocks, images) is refused by name.

Where nothing is hidden (images, of which a batch has no padding) there is no mask: everything sees everything.

Layers are numbered in the order of their calls: a block that attends twice has two.

Limits: additive position biases and attention sinks are passed on; masks made by the model itself are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from roundexport.errors import UnsupportedError
from roundexport.model._patches import attention_of

from .architectures.interface import Architecture
from .placeholders import AttentionInfo, AttentionKind, Swaps

ATTENTION = "roundexport"
_POSITIONS = (0, 1, 5, 63, 64, 1000, 8191, 8192, 100_003)


@dataclass
class _Mask:
    """One mask that was made: the tensor that stands for it, its rule, and the reach that transformers told."""

    tensor: Tensor
    rule: Callable[..., Any]
    reach: int = 0


class AttentionTrace:
    """What was seen while the model was traced.

    Args:
        model: the model, for messages.
        swaps: where attention layers are noted.
        decoder: whether the model generates; layers that do not say so are then causal, and keep a cache.
        masked: whether there is padding to hide; in batches of images there is not.

    Attributes:
        decoder: as given; of a model with two halves, whether the second one runs.
        halves: whether the model has two.
        cross: by identity, keys of cross-attention that passed through the model's cache, with their layer's number.
    """

    def __init__(self, model: nn.Module, swaps: Swaps, decoder: bool, masked: bool = True) -> None:
        self._name, self._swaps, self.decoder, self._masked = type(model).__name__, swaps, decoder, masked
        self.halves = False
        self.cross: dict[int, tuple[Tensor, int]] = {}
        self._masks: list[_Mask] = []
        self._mask_of: dict[int, _Mask] = {}

    @property
    def layers(self) -> int:
        """Attention layers seen so far."""
        return len(self._swaps.attentions)

    def start(self) -> None:
        """Forget an earlier trace."""
        self._masks.clear()
        self._mask_of.clear()
        self.cross.clear()
        self._swaps.attentions.clear()
        self._swaps.ropes = 0

    def make_mask(
        self,
        *_: Any,
        attention_mask: Tensor | None = None,
        mask_function: Any = None,
        local_size: int | None = None,
        **__: Any,
    ) -> Tensor | None:
        """What transformers calls to make a mask: the 2-D mask as it is, a tensor of its own for every rule."""
        if attention_mask is None or not (self._masked or self.halves):
            return None
        if any(mask.tensor is attention_mask for mask in self._masks):
            attention_mask = attention_mask.view(attention_mask.shape)
        self._masks.append(_Mask(attention_mask, mask_function, int(local_size or 0)))
        return attention_mask

    def attend(  # noqa: PLR0913, PLR0917  (the signature is transformers')
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """What transformers calls to attend."""
        index = len(self._swaps.attentions)
        if not self._masked and not self.halves and attention_mask is not None:  # a tower's own, over its windows
            position_bias, attention_mask = attention_mask, None
        if attention_mask is not None or self._masked:
            self._mask_of[index] = self._mask_behind(attention_mask, index)
        kind, cache = self._place(key, index)
        info = AttentionInfo(
            index=index,
            kind=kind,
            cache=cache,
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=query.shape[-1],
            value_dim=value.shape[-1],
            scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
            window=int(sliding_window or -1),
            softcap=float(softcap or 0.0),
            causal=bool(getattr(module, "is_causal", self.decoder) if is_causal is None else is_causal),
        )
        if attention_mask is None and (info.causal or info.window > 0):
            raise UnsupportedError(
                f"{self._name}: attention {index} hides positions of an image, which is not exported"
            )
        self._swaps.attentions[index] = info
        out: Tensor = torch.ops.roundexport.attention(
            query, key, value, attention_mask, position_bias, s_aux,
            info.index, info.scale, info.window, info.softcap, info.causal,
        )  # fmt: skip
        return out.transpose(1, 2), None

    def _place(self, key: Tensor, index: int) -> tuple[AttentionKind, str]:
        """Where a layer's keys come from, and what its cache is called by: its number, in a half with that half."""
        if id(key) in self.cross:
            return "cross", f"{self.cross[id(key)][1]}.encoder"
        if not self.decoder:
            return "plain", str(index)
        before = [info for info in self._swaps.attentions.values() if info.kind == "cached"]
        return "cached", f"{len(before)}.decoder" if self.halves else str(index)

    def _mask_behind(self, tensor: Tensor | None, index: int) -> _Mask:
        if tensor is None or tensor.ndim != 2:
            raise UnsupportedError(f"{self._name}: the attention got no 2-D mask; its masks are home-made")
        for mask in self._masks:
            if mask.tensor is tensor:
                return mask
        raise UnsupportedError(f"{self._name}: attention {index} got a mask that transformers' masks did not make")

    def check(self) -> None:
        """Hold what each layer says against its mask's rule; to be called after the trace.

        Raises:
            UnsupportedError: a layer's mask is neither causal nor a window, or not the one that the layer tells.
        """
        known: dict[tuple[int, bool, int], int | None] = {}
        for index, mask in self._mask_of.items():
            info = self._swaps.attentions[index]
            key = id(mask), info.causal, info.window
            if key not in known:
                known[key] = _chunk(mask, info)
            chunk = known[key]
            if info.kind == "cached" and not info.causal:
                raise UnsupportedError(
                    f"{self._name}: attention {index} reads a prompt both ways; attention operators with a KV cache "
                    "read one way, so that a prompt in pieces would see less than a whole one"
                )
            if chunk is None:
                told = ("causal" if info.causal else "not causal") + (
                    f", window {info.window}" if info.window > 0 else ""
                )
                raise UnsupportedError(
                    f"{self._name}: attention {index} has a mask of another kind than the layer tells ({told}); "
                    "it cannot be exported"
                )
            self._swaps.attentions[index] = replace(info, chunk=chunk)


@contextmanager
def attention_placeholder(
    model: nn.Module, swaps: Swaps, decoder: bool, architecture: Architecture | None = None, masked: bool = True
) -> Iterator[AttentionTrace]:
    """Inside this block the model's attention and its masks go through the placeholder.

    Args:
        model: the model.
        swaps: where attention layers are noted.
        decoder: whether the model generates.
        architecture: of a family whose attention must be shown the way.
        masked: whether there is padding to hide.

    Raises:
        UnsupportedError: the attention is written out and does not go through transformers' attention interface.
    """
    trace = AttentionTrace(model, swaps, decoder, masked)
    with attention_of(
        model, ATTENTION, trace.attend, trace.make_mask, asks=architecture is None or architecture.by_name(model)
    ):
        with architecture.routed(model, trace) if architecture else nullcontext():
            yield trace


def _chunk(mask: _Mask, info: AttentionInfo) -> int | None:
    """Tokens of a chunk, 0 where the mask is what the layer tells, None where it is something else."""
    chunks = masking_utils.chunked_causal_mask_function(1, torch.zeros(1, dtype=torch.long))
    if _codes(mask.rule) == _codes(chunks):  # not to be called: it reads a tensor of the trace
        return mask.reach if info.causal and info.window < 0 and mask.reach > 0 else None
    return 0 if follows(mask.rule, info.causal, info.window) else None


def _codes(rule: Any) -> list[Any]:
    """Code of a function and of those that it closes over, in order."""
    inside = [cell.cell_contents for cell in rule.__closure__ or ()]
    functions = [part for value in inside for part in (value if isinstance(value, tuple) else (value,))]
    return [rule.__code__, *(code for part in functions if inspect.isfunction(part) for code in _codes(part))]


def follows(rule: Callable[..., Any], causal: bool, window: int) -> bool:
    """Whether a mask's rule hides and shows what these two words say, at the probe positions."""
    for query in _POSITIONS:
        edges = (-query, -1, 0, 1, query // 2 - query, -window, 1 - window, window, window - 1)
        for distance in edges:
            key = query + distance
            if key < 0:
                continue
            visible = (key <= query or not causal) and (window < 0 or abs(distance) < window)
            try:
                found = bool(rule(*map(torch.tensor, (0, 0, query, key))))
            except Exception:  # a rule that reads the batch's contents; strangers' code raises whatever it pleases
                return False
            if found != visible:
                return False
    return True
