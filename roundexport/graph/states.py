"""State other than keys and values, routed through placeholders: short convolutions and linear attention.

    roundexport::causal_conv(x, weight, bias, index, silu)              y [B, C, S]
        x [B, C, S] of the NEW tokens only, weight [C, K]: y_t = Σ_k weight_k · x_(t-K+1+k) + bias, then x·sigmoid(x)
        where ``silu``; what came before is the state [B, C, K-1], the last K-1 columns of x
    roundexport::linear_attention(q, k, v, decay, beta, index, groups, scale)    o [B, S, H, Dv]
        q, k [B, S, G, Dk], G groups, each serving H/G heads in a row of v [B, S, H, Dv]; beta [B, S, H];
        decay [B, S, H], or [B, S, H, Dk] where every row of the state has its own
            S_t = exp(decay_t)·S_(t-1) + k_t ⊗ u_t        o_t = scale · S_tᵀ q_t        S [B, H, Dk, Dv] is the state
            u_t = v_t, or with beta the gated delta rule, u_t = beta_t · (v_t - exp(decay_t)·S_(t-1)ᵀ k_t)
    roundexport::weighted_average(k, v, decay, first, index)            o [B, S, C]
        k, v [B, S, C]; decay, first [C]: an average of values by e^k that older tokens fade out of, RWKV's attention
            o_t = (n + e^(first + k_t)·v_t) / (d + e^(first + k_t))
            n' = e^decay·n + e^k_t·v_t        d' = e^decay·d + e^k_t
        the state [B, 3, C] is n·e^-m, d·e^-m and m, the largest exponent so far; d is 0 where nothing was read
    roundexport::tokens_only(x, mask)                                    x [B, S, H], 0 where a token is padding

transformers 5 asks its cache for such states, and computes with functions that every modeling file has under the same
names.  While a model is traced the cache says that there is none yet, and those functions are the placeholders; keeping
the state is the target's business, as it is for keys and values.  Mamba-2's scan is the second rule with q = C, k = B,
v = x·dt and decay = A·dt; Mamba's is the same with a head of one value for every channel, and a decay for each of its N
rows; Qwen3.5's is the delta rule.  A family's file (architectures/) may call ``attend`` and ``convolve`` of the cache.

Which functions those are, and how they are told, is in state_functions.py.  A state that reaches the cache in another
way is refused, so none is lost.

Source: cache_utils.py and modeling files of transformers 5.23; Yang et al., Gated Delta Networks (2024); Dao and Gu,
Transformers are SSMs (2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from roundexport.errors import UnsupportedError

from .placeholders import define

define(
    "causal_conv(Tensor x, Tensor weight, Tensor? bias, int index, bool silu) -> Tensor",
    lambda x, weight, bias, index, silu: torch.empty_like(x),
)
define(
    "linear_attention(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor? beta, int index, int groups, float scale)"
    " -> Tensor",
    lambda q, k, v, decay, beta, index, groups, scale: torch.empty_like(v),
)
define(
    "weighted_average(Tensor k, Tensor v, Tensor decay, Tensor first, int index) -> Tensor",
    lambda k, v, decay, first, index: torch.empty_like(v),
)
define("tokens_only(Tensor x, Tensor mask) -> Tensor", lambda x, mask: torch.empty_like(x))


Kind = Literal["conv", "recurrent", "attention_shift", "feed_forward_shift"]
"""What a state is of; a layer has one of each at most, shifts being convolutions that give the token before."""


@dataclass(frozen=True)
class StateInfo:
    """One state that a layer carries from token to token.

    Args:
        index: of its placeholder.
        layer: the layer's number in the model.
        kind: what it is the state of.
        shape: of one row.
    """

    index: int
    layer: int
    kind: Kind
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Its name in a graph, behind ``past.`` or ``present.``."""
        return f"{self.layer}.{self.kind}"


class StateTrace:
    """States seen while a model is traced.

    Attributes:
        found: in order of their index.
        key_updates: how often a layer gave its cache keys and values.
    """

    found: list[StateInfo]
    key_updates: int

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Forget an earlier trace."""
        self.found, self.key_updates = [], 0
        self._pending: int | None = None  # the layer whose convolution comes next
        self._layer: int | None = None  # the layer that asked for its recurrent state last
        self._given: Tensor | None = None  # what stands for the recurrent state of that layer

    def cache(self, config: Any) -> DynamicCache:
        """A cache for one trace that hands new keys, values and inputs of convolutions through."""
        return _NewOnly(self, config)

    def conv_input(self, layer: int, place: int) -> None:
        """A layer gives its cache the inputs of its convolution."""
        if self._pending is not None or place:
            raise self._lost(layer, "several convolutions")
        self._pending = layer

    def recurrent_asked(self, layer: int, place: int) -> None:
        """A layer asks its cache for its recurrent state."""
        if place:
            raise self._lost(layer, "several recurrent states")
        self._layer = layer

    def recurrent_given(self, layer: int, state: Tensor) -> None:
        """A layer gives its cache a recurrent state, which must be the stand-in for one."""
        if state is not self._given or layer != self._layer:
            raise self._lost(layer, "a recurrent state")
        self._layer = self._given = None

    def unfinished(self) -> str | None:
        """What is to be said of a trace that broke off in a layer with a recurrent state; None: it did not."""
        return None if self._layer is None else str(self._lost(self._layer, "a recurrent state"))

    def check(self) -> None:
        """To be called after the trace.

        Raises:
            UnsupportedError: a convolution whose input was cached did not run through the placeholder.
        """
        if self._pending is not None:
            raise self._lost(self._pending, "a convolution")

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor | None:
        """The placeholder of a convolution whose input was cached; None where it was not."""
        if self._pending is None:
            return None
        info = self._note(self._pending, "conv", (x.shape[1], weight.shape[-1] - 1))
        self._pending = None
        y: Tensor = torch.ops.roundexport.causal_conv(x, weight, bias, info.index, silu)
        return y

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor] | None:
        """Outputs of the placeholder of linear attention and a stand-in for its state; None without a cache."""
        if self._layer is None:
            return None
        info = self._note(self._layer, "recurrent", (v.shape[2], k.shape[3], v.shape[3]))
        groups = int(q.shape[2])
        o: Tensor = torch.ops.roundexport.linear_attention(q, k, v, decay, beta, info.index, groups, scale)
        self._given = o.new_empty(0)
        return o, self._given

    def shifted(self, layer: int, x: Tensor, kind: Kind) -> Tensor:
        """Every token's row of x [B, S, C] for the token behind it: a convolution that sees the one before alone."""
        info = self._note(layer, kind, (x.shape[2], 1))
        one = torch.ones(x.shape[2], 1)
        columns, weight = x.transpose(1, 2), torch.cat([one, torch.zeros_like(one)], 1)
        y: Tensor = torch.ops.roundexport.causal_conv(columns, weight, None, info.index, False)
        return y.transpose(1, 2)

    def averaged(self, layer: int, k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> Tensor:
        """The placeholder of an average that older tokens fade out of."""
        info = self._note(layer, "recurrent", (3, k.shape[2]))
        o: Tensor = torch.ops.roundexport.weighted_average(k, v, decay, first, info.index)
        return o

    def _note(self, layer: int, kind: Kind, shape: tuple[int, ...]) -> StateInfo:
        info = StateInfo(len(self.found), layer, kind, tuple(map(int, shape)))
        if any(other.name == info.name for other in self.found):
            raise UnsupportedError(f"layer {layer} has several {kind} states; one is exported")
        self.found.append(info)
        return info

    def _lost(self, layer: int, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"layer {layer} keeps {what} between steps, of a kind that is not exported; short convolutions, the gated "
            "delta rule, Mamba's scans and RWKV's averages are"
        )


class _NewOnly(DynamicCache):  # type: ignore[misc]
    """A cache that hands what is new through: keeping the old is the target's business."""

    def __init__(self, states: StateTrace, config: Any) -> None:
        super().__init__(config=config)
        self._states = states

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self._states.key_updates += 1
        return key_states, value_states

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0

    def get_conv_state(self, *_: Any, **__: Any) -> None:
        return None

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        self._states.conv_input(layer_idx, state_idx)
        return conv_states

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        self._states.recurrent_asked(layer_idx, state_idx)

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, scale: float = 1.0) -> Tensor:
        """Linear attention [B, S, H, Dv] of a layer that keeps its state where no cache of transformers has it."""
        self._states.recurrent_asked(layer_idx, 0)
        found = self._states.attend(q, k, v, decay, None, scale)
        if found is None:
            raise AssertionError("a layer that has asked is attended to")
        self._states.recurrent_given(layer_idx, found[1])
        return found[0]

    def convolve(self, layer_idx: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The short convolution [B, C, S] of a layer that keeps its state where no cache of transformers has it."""
        self._states.conv_input(layer_idx, 0)
        found = self._states.conv(x, weight, bias, False)
        if found is None:
            raise AssertionError("a layer that has given its input is convolved")
        return found

    def shift(self, layer_idx: int, x: Tensor, kind: Kind) -> Tensor:
        """Rows of x [B, S, C], each for the token behind it."""
        return self._states.shifted(layer_idx, x, kind)

    def average(self, layer_idx: int, k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> Tensor:
        """An average [B, S, C] of v by e^k that older tokens fade out of."""
        return self._states.averaged(layer_idx, k, v, decay, first)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Tensor:
        self._states.recurrent_given(layer_idx, recurrent_states)
        return recurrent_states


def drop_whole_slices(program: torch.export.ExportedProgram) -> None:
    """Take slices that keep everything out of a program: "the last S of S", which stands behind every convolution."""
    conv, slice_ = torch.ops.roundexport.causal_conv.default, torch.ops.aten.slice.Tensor
    for node in list(program.graph.nodes):
        if node.target is slice_ and node.args[0].target is conv and _shape(node) == _shape(node.args[0]):
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)


def _shape(node: Any) -> list[str]:
    return [str(dim) for dim in node.meta["val"].shape]
