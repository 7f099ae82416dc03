"""Transformations in a tuning run: before a block is rounded it is changed to an equivalent one that rounds better.

What changes beside the weights to be rounded (norms, biases, linears kept float) becomes overrides of the artifact, and
is kept with the run's state, as the artifact's overrides are written at its very end: a run that goes on adds those of
the blocks that are done again.  The float model's hidden states stay what they were, the blocks being equivalent.

A transformation defines one of

    transform_block(block, inputs, specs, settings)                             block by block
    train_model(model, stack, ids, block_specs, settings, seed, report)         all blocks at once, before the first one
    fold_block(block, inputs, specs, factors)                                   and what came of it, in a block's turn

The second takes the whole float model in memory.  Its :class:`Factors` are kept with the run's state.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn

from roundexport import plugins
from roundexport.algorithms.interface import BlockSize, Factors
from roundexport.errors import UsageError
from roundexport.model.blocks import find_stack, linears, weight_of

from .cost_model import Estimate

if TYPE_CHECKING:
    from roundexport.algorithms.interface import BlockInputs
    from roundexport.quant.spec import QuantSpec


@dataclass(frozen=True, eq=False)
class Transform:
    """A transformation with its settings; made by :func:`load_transform`.

    Args:
        name: the method's.
        method: its module.
        options: its Settings.
        factors: what was trained, where :attr:`whole`; None before that.
    """

    name: str
    method: ModuleType
    options: Any
    factors: Factors | None = None

    @property
    def whole(self) -> bool:
        """Whether all blocks are trained at once, before the first one's turn."""
        return hasattr(self.method, "train_model")

    def to_json(self) -> dict[str, Any]:
        """Name and settings, and losses once all blocks were trained."""
        found: dict[str, Any] = {"name": self.name, "settings": dataclasses.asdict(self.options)}
        if self.factors is not None:
            found["losses"] = [self.factors.loss_before, self.factors.loss_after]
        return found

    def forward_passes(self, samples: int) -> float:
        """Block forwards over one sample that a block takes in its turn."""
        found: float = 0.0 if self.whole else self.options.forward_passes(samples)
        return found

    def bytes_held(self, model: nn.Module, length: int) -> float:
        """Memory that :meth:`train` takes beside the model, for samples of so many tokens; weights may be on meta."""
        matrices = [weight_of(module) for block in find_stack(model).blocks for module in linears(block).values()]
        head = model.get_output_embeddings()  # type: ignore[operator]
        rows = 0 if head is None else len(head.weight)
        weights, outputs = sum(matrix.numel() for matrix in matrices), sum(len(matrix) for matrix in matrices)
        return 4.0 * float(self.options.whole_model_floats(weights, outputs, rows, length))

    def estimate(self, model: nn.Module, ids: Tensor) -> Estimate:
        """Time and memory that :meth:`train` will take, from one forward of the model, which is in memory."""
        batch = ids[: self.options.batch_size].to(next(model.parameters()).device)
        since = time.monotonic()
        with torch.no_grad():
            model(input_ids=batch, use_cache=False)
        seconds = (time.monotonic() - since) / len(batch) * self.options.forward_passes(len(ids))
        return Estimate(seconds, psutil.Process().memory_info().rss + self.bytes_held(model, ids.shape[1]))

    def train(
        self,
        model: nn.Module,
        ids: Tensor,
        block_specs: Sequence[Mapping[str, QuantSpec]],
        seed: int,
        report: Callable[[float], None],
    ) -> Transform:
        """Train all blocks at once; where :attr:`whole`.

        Args:
            model: the float model, in memory; not changed.
            ids: token ids [n, S] of the calibration samples.
            block_specs: per block, scheme by the linear's name in the block.
            seed: of the order of samples.
            report: called with the share of the work that is done.

        Returns:
            The transformation with its factors.
        """
        stack = find_stack(model)
        factors = self.method.train_model(model, stack, ids, block_specs, self.options, seed, report)
        return dataclasses.replace(self, factors=factors)

    def apply(
        self, block: nn.Module, index: int, inputs: BlockInputs, specs: Mapping[str, QuantSpec]
    ) -> dict[str, Tensor]:
        """Transform a block in place.

        Args:
            block: the float block, on ``inputs.device``.
            index: the block's.
            inputs: hidden states and target.
            specs: scheme by the linear's name in the block.

        Returns:
            What changed beside weights in ``specs``, by parameter name in the block, in main memory.
        """
        if self.factors is None:
            changed = self.method.transform_block(block, inputs, specs, self.options)
        else:
            changed = self.method.fold_block(block, inputs, specs, self.factors.blocks.get(index, {}))
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
    method = plugins.load("algorithms", name)
    if not (hasattr(method, "transform_block") or hasattr(method, "train_model")):
        raise UsageError(
            f"{name!r} does not transform blocks before they are rounded; use teq, teq_noise, teq_model, or none"
        )
    return Transform(name, method, options_of(method))


@dataclass(frozen=True, eq=False)
class Finish:
    """A finish with its settings; made by :func:`load_finish`."""

    name: str
    method: ModuleType
    options: Any

    def fitted(self, size: BlockSize) -> Finish:
        """The same with settings that fit in the memory there is, where the method can choose."""
        return dataclasses.replace(self, options=self.options.fitted(size))

    def to_json(self) -> dict[str, Any]:
        """Name and settings."""
        return {"name": self.name, "settings": dataclasses.asdict(self.options)}


def load_finish(name: str | None, options_of: Callable[[ModuleType], Any]) -> Finish | None:
    """The finish of this name; None for none.

    Args:
        name: a file of ``roundexport/algorithms``.
        options_of: makes a method's Settings.

    Raises:
        UsageError: no such file, or one that does not finish.
    """
    if name is None:
        return None
    method = plugins.load("algorithms", name)
    if not hasattr(method, "finish"):
        raise UsageError(f"{name!r} does not tune a whole model after its blocks; use end_to_end, or none")
    return Finish(name, method, options_of(method))


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
