"""Transformations in a tuning run: before a block is rounded it is changed to an equivalent one that rounds better.

What changes beside the weights to be rounded (norms, biases, linears kept float) becomes overrides of the artifact, and
is kept with the run's state, as the artifact's overrides are written at its very end: a run that goes on adds those of
the blocks that are done again.  The float model's hidden states stay what they were, the blocks being equivalent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import discovery
from .errors import UsageError

if TYPE_CHECKING:
    from .blocks import BlockInputs
    from .spec import QuantSpec


@dataclass(frozen=True, eq=False)
class Transform:
    """A transformation with its settings; made by :func:`load_transform`."""

    name: str
    method: ModuleType
    options: Any

    def to_json(self) -> dict[str, Any]:
        """Name and settings."""
        return {"name": self.name, "settings": dataclasses.asdict(self.options)}

    def cost(self, samples: int) -> float:
        """Block forwards over one sample that a block takes."""
        found: float = self.options.cost(samples)
        return found

    def apply(self, block: nn.Module, inputs: BlockInputs, specs: Mapping[str, QuantSpec]) -> dict[str, Tensor]:
        """Transform a block in place.

        Args:
            block: the float block, on ``inputs.device``.
            inputs: hidden states and target.
            specs: scheme by the linear's name in the block.

        Returns:
            What changed beside weights in ``specs``, by parameter name in the block, in main memory.
        """
        changed = self.method.transform_block(block, inputs, specs, self.options)
        return {name: tensor.float().cpu() for name, tensor in changed.items()}


def load_transform(name: str | None, options_of: Callable[[ModuleType], Any]) -> Transform | None:
    """The transformation of this name; None for none.

    Args:
        name: a file of ``roundexport/algorithms``.
        options_of: makes a method's Settings.

    Raises:
        UsageError: no such file, or one that does not transform blocks.
    """
    if name is None:
        return None
    method = discovery.load("algorithms", name)
    if not hasattr(method, "transform_block"):
        raise UsageError(f"{name!r} does not transform blocks before they are rounded; use teq, or none")
    return Transform(name, method, options_of(method))


def shares(
    report: Callable[[float], None], first: float, second: float
) -> tuple[Callable[[float], None], Callable[[float], None]]:
    """Two reports for two pieces of work, in proportion to what they cost, that together make one."""
    part = first / (first + second) if first + second > 0 else 0.5

    def before(done: float) -> None:
        report(done * part)

    def after(done: float) -> None:
        report(part + done * (1 - part))

    return before, after
