"""State other than keys and values, routed through placeholders: short convolutions and linear attention.

    roundexport::causal_conv(x, weight, bias, index, silu)              y [B, C, S]
        x [B, C, S] of the NEW tokens only, weight [C, K]: y_t = Σ_k weight_k · x_(t-K+1+k) + bias, then x·sigmoid(x)
        where ``silu``; what came before is the state [B, C, K-1], the last K-1 columns of x
    roundexport::linear_attention(q, k, v, decay, beta, index, groups, scale)    o [B, S, H, Dv]
        q, k [B, S, G, Dk], G groups, each serving H/G heads in a row of v [B, S, H, Dv]; decay and beta [B, S, H]
            S_t = exp(decay_t)·S_(t-1) + k_t ⊗ u_t        o_t = scale · S_tᵀ q_t        S [B, H, Dk, Dv] is the state
            u_t = v_t, or with beta the gated delta rule, u_t = beta_t · (v_t - exp(decay_t)·S_(t-1)ᵀ k_t)
    roundexport::tokens_only(x, mask)                                    x [B, S, H], 0 where a token is padding

transformers 5 asks its cache for such states, and computes with functions that every modeling file has under the same
names.  While a model is traced the cache says that there is none yet, and those functions are the placeholders; keeping
the state is the target's business, as it is for keys and values.  Mamba-2's scan is the second rule with q = C, k = B,
v = x·dt and decay = A·dt; Qwen3.5's is the delta rule.

A function is replaced only where it gives, on random input, what the formula above gives.  A state that reaches the
cache in another way is refused, so none is lost.

Source: cache_utils.py and modeling files of transformers 5.23; Yang et al., Gated Delta Networks (2024); Dao and Gu,
Transformers are SSMs (2024).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (as everybody calls it)
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache

from roundexport.errors import UnsupportedError
from roundexport.model._patches import function_in

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
define("tokens_only(Tensor x, Tensor mask) -> Tensor", lambda x, mask: torch.empty_like(x))

_Function = Callable[..., Any]
_EPS = 1e-6  # of the norm inside the delta rule


@dataclass(frozen=True)
class StateInfo:
    """One state that a layer carries from token to token.

    Args:
        index: of its placeholder.
        layer: the layer's number in the model.
        kind: what it is the state of; a layer has one of each kind at most.
        shape: of one row.
    """

    index: int
    layer: int
    kind: Literal["conv", "recurrent"]
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

    def _note(self, layer: int, kind: Literal["conv", "recurrent"], shape: tuple[int, ...]) -> StateInfo:
        info = StateInfo(len(self.found), layer, kind, tuple(map(int, shape)))
        if any(other.name == info.name for other in self.found):
            raise UnsupportedError(f"layer {layer} has several {kind} states; one is exported")
        self.found.append(info)
        return info

    def _lost(self, layer: int, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"layer {layer} keeps {what} between steps, of a kind that is not exported; short convolutions, the gated "
            "delta rule and Mamba-2's scan are"
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

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Tensor:
        self._states.recurrent_given(layer_idx, recurrent_states)
        return recurrent_states


@contextmanager
def state_placeholders(model: nn.Module) -> Iterator[StateTrace]:
    """Inside this block the functions that compute with states are the placeholders, where their values agree."""
    trace = StateTrace()
    names = {type(part).__module__ for part in model.modules()}
    with ExitStack() as opened:
        for module in (sys.modules[name] for name in sorted(names)):
            for name, (agrees, stand_in) in _FUNCTIONS.items():
                original = getattr(module, name, None)
                if callable(original) and agrees(original):
                    opened.enter_context(function_in(module, name, stand_in(trace, original)))
        yield trace


def drop_whole_slices(program: torch.export.ExportedProgram) -> None:
    """Take slices that keep everything out of a program: "the last S of S", which stands behind every convolution."""
    conv, slice_ = torch.ops.roundexport.causal_conv.default, torch.ops.aten.slice.Tensor
    for node in list(program.graph.nodes):
        if node.target is slice_ and node.args[0].target is conv and _shape(node) == _shape(node.args[0]):
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)


def _shape(node: Any) -> list[str]:
    return [str(dim) for dim in node.meta["val"].shape]


def _conv(trace: StateTrace, original: _Function) -> _Function:
    def placeholder(
        hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
    ) -> Tensor:
        silu = activation in ("silu", "swish")
        y = trace.conv(hidden_states, weight, bias, silu)
        if y is None:
            return original(hidden_states, weight, bias, activation)  # type: ignore[no-any-return]
        return y if silu or activation is None else ACT2FN[activation](y)

    return placeholder


def _is_conv(function: _Function) -> bool:
    x, weight, bias = _random((2, 6, 5), (6, 3), (6,))
    expected = F.silu(F.conv1d(F.pad(x, (2, 0)), weight[:, None], bias, groups=6))
    return _gives(expected, lambda: function(x, weight, bias, activation="silu"))


def _delta_rule(trace: StateTrace, original: _Function) -> _Function:
    def placeholder(
        query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor,
        use_qk_l2norm_in_kernel: bool = False, **more: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        scale = query.shape[-1] ** -0.5
        q, k = (_unit_placeholder(query), _unit_placeholder(key)) if use_qk_l2norm_in_kernel else (query, key)
        found = trace.attend(q, k, value, g, beta, scale)
        given = {"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel, **more}
        return found or original(query, key, value, g=g, beta=beta, **given)

    return placeholder


def _is_delta_rule(function: _Function) -> bool:
    q, k, v, g, b = _random((2, 5, 2, 8), (2, 5, 2, 8), (2, 5, 4, 6), (2, 5, 4), (2, 5, 4))
    decay, beta = -F.softplus(g), b.sigmoid()
    expected = recurrence(_unit(q), _unit(k), v, decay, beta, 8**-0.5)
    return _gives(expected, lambda: function(q, k, v, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)[0])


def _scan(trace: StateTrace, original: _Function) -> _Function:
    def placeholder(hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **given: Any) -> Any:  # noqa: N803
        if not given.get("return_final_states") or given.get("z") is not None:
            return original(hidden_states, dt, A, B, C, **given)
        skip, bias, limit = given.get("D"), given.get("dt_bias"), given.get("dt_limit")
        step = dt if bias is None else dt + bias
        step = F.softplus(step) if given.get("dt_softplus") else step
        if limit is not None and tuple(limit) != (0.0, float("inf")):
            step = step.clamp(*limit)
        found = trace.attend(C, B, hidden_states * step[..., None], A * step, None, 1.0)
        if found is None:
            return original(hidden_states, dt, A, B, C, **given)
        out, state = found
        return (out if skip is None else out + skip[:, None] * hidden_states), state

    return placeholder


def _is_scan(function: _Function) -> bool:
    x, t, a, b, c, d = _random((2, 5, 4, 6), (2, 5, 4), (4,), (2, 5, 2, 8), (2, 5, 2, 8), (4,))
    step, rate = F.softplus(t + d), -a.exp()
    expected = recurrence(c, b, x * step[..., None], rate * step, None, 1.0) + d[:, None] * x
    return _gives(expected, lambda: function(x, t, rate, b, c, chunk_size=4, D=d, dt_bias=d, dt_softplus=True))


def _mask(_: StateTrace, __: _Function) -> _Function:
    def placeholder(
        config: Any = None, inputs_embeds: Any = None, attention_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor | None:
        return attention_mask  # whole; who reads it knows which of its columns are the new tokens'

    return placeholder


def _without_padding(_: StateTrace, __: _Function) -> _Function:
    def placeholder(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is None:
            return hidden_states
        return torch.ops.roundexport.tokens_only(hidden_states, attention_mask)  # type: ignore[no-any-return]

    return placeholder


def _is_without_padding(function: _Function) -> bool:
    (x,) = _random((2, 3, 4))
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    return _gives(x * mask[..., None], lambda: function(x, mask))


def recurrence(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, scale: float) -> Tensor:
    """The rule of ``linear_attention`` on an empty state, token by token."""
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    state = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    found = []
    for t in range(v.shape[1]):
        state = state * decay[:, t, :, None, None].exp()
        new = v[:, t]
        if beta is not None:
            new = beta[:, t, :, None] * (new - (state * k[:, t, :, :, None]).sum(2))
        state = state + k[:, t, :, :, None] * new[:, :, None]
        found.append((state * q[:, t, :, :, None]).sum(2) * scale)
    return torch.stack(found, 1)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + _EPS)


def _unit_placeholder(x: Tensor) -> Tensor:
    """The same as an RMS norm, for which runtimes have an operator: x/√(Σx² + ε) = x/√(Σx²/D + ε/D) · 1/√D."""
    width = x.shape[-1]
    found: Tensor = torch.ops.roundexport.rms_norm(x, torch.full((width,), width**-0.5), _EPS / width)
    return found


def _random(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _gives(expected: Tensor, compute: Callable[[], Any]) -> bool:
    try:
        with torch.no_grad():
            found = compute()
    except (TypeError, ValueError, RuntimeError):
        return False
    return isinstance(found, Tensor) and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


# Name in modeling files -> whether a function of that name is the one that is meant, and what stands in for it.
_FUNCTIONS: dict[str, tuple[Callable[[_Function], bool], Callable[[StateTrace, _Function], _Function]]] = {
    "causal_conv1d_fn": (_is_conv, _conv),
    "torch_chunk_gated_delta_rule": (_is_delta_rule, _delta_rule),
    "mamba2_chunk_scan": (_is_scan, _scan),
    "create_recurrent_attention_mask": (lambda _: True, _mask),
    "apply_mask_to_padding_states": (_is_without_padding, _without_padding),
}
