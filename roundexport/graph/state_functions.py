"""The functions of modeling files that compute with states, and what stands in for each while a model is traced.

    causal_conv1d_fn                   a short convolution            ──▶  roundexport::causal_conv
    torch_chunk_gated_delta_rule       Qwen3.5's linear attention     ──▶  roundexport::linear_attention with beta
    mamba2_chunk_scan                  Mamba-2's scan                 ──▶  roundexport::linear_attention
    mamba_selective_scan               Mamba's scan                   ──▶  the same with a decay for every row
    apply_mask_to_padding_states                                      ──▶  roundexport::tokens_only

They have these names in every file of transformers 5.  One is replaced only where it gives, on random input, what the
formula in states.py gives.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (as everybody calls it)
from transformers.activations import ACT2FN

from roundexport.model._patches import function_in

from .states import StateTrace

_Function = Callable[..., Any]
_EPS = 1e-6  # of the norm inside the delta rule


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


def _selective_scan(trace: StateTrace, original: _Function) -> _Function:
    def placeholder(hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **given: Any) -> Any:  # noqa: N803
        if not given.get("return_last_state"):
            return original(hidden_states, dt, A, B, C, **given)
        skip, bias, gate = given.get("D"), given.get("delta_bias"), given.get("z")
        step = (dt if bias is None else dt + bias[:, None]).transpose(1, 2)  # [B, S, channels]
        step = F.softplus(step) if given.get("delta_softplus") else step
        q, k = (x.transpose(1, 2)[:, :, None] for x in (C, B))
        entering = hidden_states.transpose(1, 2) * step
        found = trace.attend(q, k, entering[..., None], step[..., None] * A, None, 1.0)
        if found is None:
            return original(hidden_states, dt, A, B, C, **given)
        out = found[0].squeeze(-1).transpose(1, 2)
        out = out if skip is None else out + hidden_states * skip[:, None]
        return (out if gate is None else out * F.silu(gate)), found[1]

    return placeholder


def _is_selective_scan(function: _Function) -> bool:
    x, t, a, b, c, d, z = _random((2, 6, 5), (2, 6, 5), (6, 4), (2, 4, 5), (2, 4, 5), (6,), (2, 6, 5))
    step, rate = F.softplus(t + d[:, None]).transpose(1, 2), -a.exp()
    q, k = (value.transpose(1, 2)[:, :, None] for value in (c, b))
    scanned = recurrence(q, k, (x.transpose(1, 2) * step)[..., None], step[..., None] * rate, None, 1.0)
    expected = (scanned[..., 0].transpose(1, 2) + x * d[:, None]) * F.silu(z)
    given = {"D": d, "z": z, "delta_bias": d, "delta_softplus": True, "return_last_state": True}
    return _gives(expected, lambda: function(x, t, rate, b, c, **given)[0])


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
        rate = decay[:, t].exp()
        state = state * (rate[..., None, None] if decay.ndim == 3 else rate[..., None])
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
    "mamba_selective_scan": (_is_selective_scan, _selective_scan),
    "create_recurrent_attention_mask": (lambda _: True, _mask),
    "apply_mask_to_padding_states": (_is_without_padding, _without_padding),
}
