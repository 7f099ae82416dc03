"""Mixtures of experts as linears: a module of transformers that stacks its experts becomes one that holds each apart.

    <experts>.<number>     y = down(act(gate(x), up(x)))      three linears; two where the family has no gate

The router stays what it is: it says for every token which experts compute (`top_k_index` [T, k]) and how much of each
counts (`top_k_weights` [T, k]):

    out[t] = Σ_j top_k_weights[t, j] · expert(top_k_index[t, j])(x[t])

Tokens are sorted by expert, so that each is called once with its tokens, and not at all where it has none.  The
activation is the family's own: it is called with gate and up laid out as its stacked weights would have given them.

Which modules these are is said by transformers' own registry for experts (`use_experts_implementation`), whose contract
is this formula for every module in it.  What departs from it is refused by name.  Families that are not in it have a
file each in mixtures/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from roundexport.errors import UnsupportedError

from .expert_names import DOWN, GATE, LAYOUTS, UP, Layout
from .mixtures.interface import mixture_of


class Expert(nn.Module):
    """One expert: the linears of one gated or plain feed-forward layer.

    Args:
        activation: of gate and up [.., 2I] as the family lays them out, or of up [.., I] alone.
        layout: of gate and up.
        linears: by name.
    """

    def __init__(self, activation: Callable[[Tensor], Tensor], layout: Layout, linears: dict[str, nn.Linear]) -> None:
        super().__init__()
        self._activation, self._layout = activation, layout
        for name, linear in linears.items():
            self.add_module(name, linear)

    @property
    def entries(self) -> tuple[str, ...]:
        """Names of the linears that read the expert's input."""
        return (GATE, UP) if GATE in self._modules else (UP,)

    def activate(self, entering: tuple[Tensor, ...]) -> Tensor:
        """What enters the last linear, from what the first ones gave."""
        if len(entering) == 1:
            return self._activation(entering[0])
        gate_up = torch.stack(entering, -1).flatten(-2) if self._layout.interleaved else torch.cat(entering, -1)
        return self._activation(gate_up)

    def inner(self, x: Tensor) -> Tensor:
        """What enters the last linear [..., I] for inputs [..., H]."""
        return self.activate(tuple(self.get_submodule(name)(x) for name in self.entries))

    def forward(self, x: Tensor) -> Tensor:
        """Output [..., H] for inputs [..., H]."""
        out: Tensor = self.get_submodule(DOWN)(self.inner(x))
        return out


class Experts(nn.Module):
    """The experts of one layer, in the place of transformers' module; its children are called by number."""

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__()
        self.num_experts = len(experts)
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)

    def experts(self) -> Iterator[Expert]:
        """Every expert, in order."""
        for module in self.children():
            if isinstance(module, Expert):
                yield module

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of what each token's experts give, [T, H]."""
        rows, width = top_k_index.shape[0], top_k_index.shape[1]
        flat = top_k_index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.num_experts).tolist()
        tokens = order // width
        share = top_k_weights.reshape(-1, 1)[order]
        out = torch.zeros(rows, hidden_states.shape[-1], dtype=hidden_states.dtype, device=hidden_states.device)
        begin = 0
        for expert, count in zip(self.experts(), counts, strict=True):
            if count:
                part = slice(begin, begin + count)
                given = expert(hidden_states[tokens[part]]) * share[part]
                out.index_add_(0, tokens[part], given.to(out.dtype))
            begin += count
        return out


@dataclass(frozen=True)
class _Gated:
    """act(gate) · up, of gate and up side by side."""

    act: Callable[[Tensor], Tensor]

    def __call__(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act(gate) * up


def gated_experts(matrices: Sequence[tuple[Tensor, Tensor, Tensor]], act: Callable[[Tensor], Tensor]) -> Experts:
    """Experts that compute down(act(gate(x)) · up(x)).

    Args:
        matrices: gate [I, H], up [I, H] and down [H, I] of each.
        act: of the gate.
    """
    activation = _Gated(act)
    linears = [
        {name: _linear(weight, None) for name, weight in zip((GATE, UP, DOWN), one, strict=True)} for one in matrices
    ]
    return Experts([Expert(activation, Layout(), own) for own in linears])


def is_stacked(module: nn.Module) -> bool:
    """Whether a module stacks experts in the way of transformers' registry."""
    return hasattr(module, "_apply_gate") and isinstance(getattr(module, "down_proj", None), nn.Parameter)


def split_experts(model: nn.Module) -> None:
    """Replace every module that stacks experts, in place; parameters become views of the stacked ones.

    Args:
        model: a transformers model, on any device.

    Raises:
        UnsupportedError: a family whose experts compute otherwise, or are stacked otherwise than LAYOUTS has it.
    """
    for name, module in list(model.named_modules()):
        mixture = mixture_of(type(module))
        if mixture is not None and type(module).__name__ == mixture.replaced:
            model.set_submodule(name, mixture.split(module))
        elif is_stacked(module):
            model.set_submodule(name, _split(module, _layout_of(model, module)))


def split_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the names of parameters of split experts begin with."""
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Experts))


def _layout_of(model: nn.Module, module: nn.Module) -> Layout:
    of: Any = module
    found = Layout(bool(of.is_transposed), bool(of.has_gate and not of.is_concatenated))
    model_type = str(model.config.model_type)  # type: ignore[union-attr]
    if getattr(of, "has_post_expert_norm", False):
        raise UnsupportedError(f"{type(module).__name__}: a norm after each expert is not supported")
    if found != LAYOUTS.get(model_type, Layout()):
        raise UnsupportedError(
            f"{type(module).__name__} ({model_type}) stacks its experts as {found}; model/expert_names.py does not know"
        )
    return found


def _split(module: nn.Module, layout: Layout) -> Experts:
    of: Any = module
    first = "gate_up_proj" if of.has_gate else "up_proj"
    count = len(of.down_proj)

    def linears(expert: int) -> dict[str, nn.Linear]:
        entering, bias = _rows(of, first, expert, layout)
        found = {}
        if of.has_gate:
            for half, part in enumerate((GATE, UP)):
                found[part] = _linear(
                    _half(entering, half, layout), None if bias is None else _half(bias, half, layout)
                )
        else:
            found[UP] = _linear(entering, bias)
        return {**found, DOWN: _linear(*_rows(of, "down_proj", expert, layout))}

    found = [linears(number) for number in range(count)]
    module._parameters.clear()  # the activation holds on to the module
    activation = of._apply_gate if of.has_gate else of.act_fn
    return Experts([Expert(activation, layout, own) for own in found])


def _rows(of: Any, name: str, expert: int, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """One expert's matrix [N, K] and bias [N] in a stack."""
    weight = getattr(of, name).detach()[expert]
    bias = getattr(of, f"{name}_bias").detach()[expert] if of.has_bias else None
    return (weight.t() if layout.transposed else weight), bias


def _half(values: Tensor, half: int, layout: Layout) -> Tensor:
    return values[half::2] if layout.interleaved else values.chunk(2)[half]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, width = weight.shape
    linear = nn.Linear(width, rows, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
