"""Rotary embeddings: one placeholder for every tensor that is turned, whatever way a family writes it.

    roundexport::rope(x, cos, sin, index, interleaved)          x [B, H, S, D]; cos, sin [B or 1, S, R/2], R ≤ D
        the first R of each head are turned in pairs (a, b), each by its angle; what is behind them stays

            a·cos - b·sin, b·cos + a·sin        halves: a = x[i], b = x[i + R/2]; interleaved: a = x[2i], b = x[2i + 1]

Families differ in where the pairs lie, in how cosines and sines are laid out (each angle in both halves, twice in a
row, once), in the sign, in whether a part of the head is turned, whether queries and keys go in together, and which
axis the heads are on.  The function they call is recognized by value: it runs beside every form of the formula on
random input, and where one agrees the placeholder takes its place.  What agrees with none stays plain operators.

Some models cut the head themselves, turn the front part and put both together; `turn_whole_heads` makes that one
placeholder of the whole head, as attention operators take it.

Limits: the turned part is the front of the head; cosines and sines are the same for all heads.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from roundexport.model._patches import function_in

from .placeholders import Swaps, define

define(
    "rope(Tensor x, Tensor cos, Tensor sin, int index, bool interleaved) -> Tensor",
    lambda x, cos, sin, index, interleaved: torch.empty_like(x),
)
ROPE = torch.ops.roundexport.rope.default
_FUNCTIONS = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave")
_HALVES, _TWICE, _ONCE = "halves", "twice", "once"
_ANGLES = {_HALVES: lambda t: t.repeat(1, 1, 2), _TWICE: lambda t: t.repeat_interleave(2, -1), _ONCE: lambda t: t}


@dataclass(frozen=True)
class _Form:
    """How a function turns.

    Args:
        tensors: names of its parameters that are turned.
        layout: how it is given cosines and sines.
        interleaved: whether pairs lie side by side.
        backwards: whether it turns by the negative angle.
        sorted: pairs lie side by side in what it gets, in halves in what it gives.
        partial: whether it takes heads wider than the part that is turned.
        heads_axis: the axis of heads, where it cannot be told which it is.
    """

    tensors: tuple[str, ...]
    layout: str
    interleaved: bool
    backwards: bool
    sorted: bool
    partial: bool
    heads_axis: int


class Rotary:
    """Turns tensors by the placeholder while one model is traced.

    Args:
        swaps: where calls are counted.
    """

    def __init__(self, swaps: Swaps) -> None:
        self._swaps = swaps
        self._known: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, heads_axis: int = 1) -> Tensor:
        """One tensor [B, H, S, D], or [B, S, H, D] with ``heads_axis`` 2, by angles [B, S, R/2]."""
        self._swaps.ropes += 1
        x = x if heads_axis == 1 else x.transpose(1, 2)
        out: Tensor = torch.ops.roundexport.rope(x, cos, sin, self._swaps.ropes - 1, interleaved)
        return out if heads_axis == 1 else out.transpose(1, 2)

    def once(self, table: Tensor, what: str, make: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``make`` gives for a table, made at the first request, so that layers share it.

        The table is kept beside it: no other gets its id while this one is known.
        """
        if (id(table), what) not in self._known:
            self._known[id(table), what] = table, make(table)
        return self._known[id(table), what][1]

    def angles(self, table: Tensor, layout: str) -> Tensor:
        """One number for each pair from cosines or sines in a layout."""
        if layout == _HALVES:
            return self.once(table, layout, lambda t: t[..., : t.shape[-1] // 2])
        return self.once(table, layout, lambda t: t[..., ::2]) if layout == _TWICE else table

    def forget(self) -> None:
        """Let go of every tensor."""
        self._known.clear()


@contextmanager
def rope_placeholder(model: nn.Module, swaps: Swaps) -> Iterator[Rotary]:
    """Inside this block the rotary functions of the modeling modules are the placeholder, where their values agree."""
    rotary = Rotary(swaps)
    modules = {name: sys.modules[name] for name in (type(part).__module__ for part in model.modules())}
    with ExitStack() as opened:
        opened.callback(rotary.forget)
        for module, name in itertools.product(modules.values(), _FUNCTIONS):
            original = getattr(module, name, None)
            form = recognized(original) if callable(original) else None
            if original is not None and form is not None:
                opened.enter_context(function_in(module, name, _turned(original, form, rotary)))
        yield rotary


def _turned(original: Callable[..., Any], form: _Form, rotary: Rotary) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def placeholder(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        tensors = [given.arguments[name] for name in form.tensors]
        cos, sin = given.arguments["cos"], given.arguments["sin"]
        axis = given.arguments.get("unsqueeze_dim", form.heads_axis)
        width = cos.shape[-1] * (2 if form.layout == _ONCE else 1)
        if axis not in (1, 2) or cos.ndim != 3 or not all(_fits(x, width, form.partial) for x in tensors):
            return original(*args, **kwargs)
        cos, sin = rotary.angles(cos, form.layout), rotary.angles(sin, form.layout)
        sin = rotary.once(sin, "negative", torch.neg) if form.backwards else sin
        tensors = [_in_halves(x) for x in tensors] if form.sorted else tensors
        turned = tuple(rotary.turn(x, cos, sin, form.interleaved and not form.sorted, axis) for x in tensors)
        return turned if len(turned) > 1 else turned[0]

    return placeholder


def _fits(x: Any, width: int, partial: bool) -> bool:
    return isinstance(x, Tensor) and x.ndim == 4 and (x.shape[-1] == width or (partial and x.shape[-1] > width))


def _in_halves(x: Tensor) -> Tensor:
    """First of all pairs, then second of all pairs."""
    return x.reshape(*x.shape[:-1], -1, 2).transpose(-1, -2).flatten(-2)


def recognized(function: Callable[..., Any]) -> _Form | None:
    """The form of a rotary function, or None where it follows none of them.

    Args:
        function: takes tensors first, then ``cos`` and ``sin`` in any order.
    """
    try:
        names = list(inspect.signature(function).parameters)
        tensors = tuple(names[: min(names.index("cos"), names.index("sin"))])
    except (TypeError, ValueError):
        return None
    generator = torch.Generator().manual_seed(0)
    angle = torch.randn(2, 3, 4, generator=generator)
    for axis, layout in itertools.product((1, 2), _ANGLES):
        found = {}
        for width in (8, 12):
            shape = (2, 5, 3, width) if axis == 1 else (2, 3, 5, width)
            given = {name: torch.randn(shape, generator=generator) for name in tensors}
            found[width] = given, _tried(function, given, _ANGLES[layout](angle))
        if found[8][1] is None:
            continue
        for interleaved, backwards, ordered in itertools.product((False, True), (False, True), (False, True)):
            form = _Form(tensors, layout, interleaved, backwards, ordered, False, axis)
            agrees = {width: _agrees(form, angle, *found[width]) for width in found}
            if agrees[8] and (interleaved or not ordered):
                return _Form(tensors, layout, interleaved, backwards, ordered, agrees[12], axis)
    return None


def _tried(function: Callable[..., Any], given: dict[str, Tensor], angle: Tensor) -> tuple[Any, ...] | None:
    try:
        found = function(**given, cos=angle.cos(), sin=angle.sin())
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    return found if isinstance(found, tuple) else (found,)


def _agrees(form: _Form, angle: Tensor, given: dict[str, Tensor], found: tuple[Any, ...] | None) -> bool:
    if found is None or len(found) != len(given):
        return False
    for x, result in zip(given.values(), found, strict=True):
        heads_first = x if form.heads_axis == 1 else x.transpose(1, 2)
        expected = formula(heads_first, angle.cos(), angle.sin() * (-1 if form.backwards else 1), form.interleaved)
        if form.sorted:
            expected = torch.cat((_in_halves(expected[..., :8]), expected[..., 8:]), -1)
        expected = expected if form.heads_axis == 1 else expected.transpose(1, 2)
        if not isinstance(result, Tensor) or result.shape != x.shape or not torch.allclose(result, expected, atol=1e-6):
            return False
    return True


def formula(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """What the placeholder means.

    Args:
        x: [B, H, S, D].
        cos: of each pair, [B or 1, S, R/2].
        sin: the same.
        interleaved: whether pairs lie side by side.
    """
    cos, sin = cos[:, None], sin[:, None]
    width = 2 * cos.shape[-1]
    front, rest = x[..., :width], x[..., width:]
    a, b = (front[..., ::2], front[..., 1::2]) if interleaved else front.chunk(2, -1)
    pair = a * cos - b * sin, b * cos + a * sin
    front = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((front, rest), -1)
