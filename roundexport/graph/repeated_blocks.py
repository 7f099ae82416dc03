"""Blocks that a dry run need not see twice: of every kind the first one stays, the others hand their input through.

    blocks   A A A B A A A B      kept   A . . B . . . .

Tracing and lowering a model take time by the block, and what they refuse lies in the kind of a block, not in its
number.  Two blocks are of one kind where all of this is equal: classes and names of their modules, shapes of their
parameters, every plain value among the modules' attributes (widths, windows, scales, whether a layer shares its keys)
but those that number the blocks, and what the config's lists with one entry a block say of it.  A block that differs in
anything is a kind of its own, so what is not understood is traced.

A block that is left out keeps its place, its attributes and its parameters; only its forward returns what it was
given, in the form in which the last kept block returned (a tensor, or a tuple that begins with it).

Limits: for finding refusals only.  The program is that of another, shallower model.  A model whose own code does not
run so fails to trace; the caller then traces all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from roundexport.model.blocks import find_stack

_PLAIN = (bool, int, float, str, type(None))


def skip_repeated_blocks(model: nn.Module) -> int:
    """Let every block that repeats an earlier one hand its input through; in place.

    Args:
        model: before its weights are swapped for placeholders.

    Returns:
        How many blocks are left out.

    Raises:
        UnsupportedError: the model has no blocks.
    """
    blocks = find_stack(model).blocks
    seen: set[Any] = set()
    returned = _Returned()
    left_out = 0
    for index, (block, made) in enumerate(zip(blocks, _kinds(blocks), strict=True)):
        kind = made, _told(model, index, len(blocks))
        if kind in seen:
            _set_forward(block, returned.hand_through)
            left_out += 1
        else:
            seen.add(kind)
            _set_forward(block, returned.noting(block.forward))
    return left_out


class _Returned:
    """What the last kept block returned in this pass."""

    def __init__(self) -> None:
        self._last: Any = None

    def noting(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a kept block."""

        def run(*args: Any, **given: Any) -> Any:
            self._last = forward(*args, **given)
            return self._last

        return run

    def hand_through(self, *args: Any, **given: Any) -> Any:
        """The forward of a block that is left out."""
        hidden = args[0] if args else given["hidden_states"]
        return hidden if isinstance(self._last, Tensor) else (hidden, *self._last[1:])


def _set_forward(block: Any, forward: Callable[..., Any]) -> None:
    block.forward = forward


def _kinds(blocks: Sequence[nn.Module]) -> Iterator[Any]:
    """For each block what it must have in common with another to be traced as one with it."""
    values = [_values(block) for block in blocks]
    numbers = {key for key in values[0] if all(own.get(key) == repr(index) for index, own in enumerate(values))}
    for block, own in zip(blocks, values, strict=True):
        built = tuple(
            (name, type(module), tuple((key, value.shape) for key, value in module.named_parameters(recurse=False)))
            for name, module in block.named_modules()
        )
        yield built, tuple((key, value) for key, value in own.items() if key not in numbers)


def _values(block: nn.Module) -> dict[tuple[str, str], str]:
    """Plain attributes of a block's modules; other values (activations, configs) are the whole model's."""
    found = {}
    for name, module in block.named_modules():
        for key, value in vars(module).items():
            parts = value if isinstance(value, list | tuple) else (value,)
            if not key.startswith("_") and all(isinstance(part, _PLAIN) for part in parts):
                found[name, key] = repr(value)
    return found


def _told(model: nn.Module, index: int, count: int) -> tuple[tuple[str, str], ...]:
    """What lists of the config with one entry a block say of this one."""
    told = getattr(model, "config").to_dict()  # noqa: B009  (nn.Module does not declare it)
    return tuple(
        (name, repr(value[index])) for name, value in told.items() if isinstance(value, list) and len(value) == count
    )
