"""What a finisher takes and returns, and the interface by which it saves its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from roundexport.model.block_call import BlockCall
    from roundexport.model.streamed_model import StreamedModel
    from roundexport.quant.quantized_linear import QuantizedLinear


@dataclass(frozen=True, eq=False)
class Point:
    """Tensors of a window after some steps."""

    step: int
    tensors: dict[str, Tensor]


class FinisherState(Protocol):
    """Where a finisher writes down what is half done; a run that was killed goes on from there."""

    def load(self, window: int) -> Point | None:
        """What was written of a window; None where nothing was."""

    def due(self) -> bool:
        """Whether it is time to write again."""

    def save(self, window: int, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a window's tensors, float32, after ``step`` steps, over what was there."""


class NoState:
    """Writes nothing down."""

    def load(self, window: int) -> Point | None:
        """Nothing was written."""
        del window
        return None

    def due(self) -> bool:
        """Never."""
        return False

    def save(self, window: int, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Forgets it."""


@dataclass(frozen=True, eq=False)
class FinishInputs:
    """What a finish is given.

    Args:
        weights: the float model; lm_head is in memory, blocks are taken as they are needed.
        calls: how each block is called.
        ids: calibration samples [n, S].
        mask: [n, S], 1 where a position counts.
        start: hidden states that enter the first block, from the quantized embedding, [n, S, H].
        floats: those of the float model.
        tables: dequantized parameters after the blocks, lm_head among them, by name.
        layers: quantized linears by path.
        vectors: norms and biases inside blocks as they are now, by parameter name; they are tuned.
        fixed: other parameters inside blocks that differ from the float model's, by name.
        transformed: the layers are roundings of other weights than the float model's.
        seed: of the order of samples.
        device: where to compute.
        state: saves and loads the state of an unfinished window.
        report: called with the share of the work that is done.
    """

    weights: StreamedModel
    calls: Sequence[BlockCall]
    ids: Tensor
    mask: Tensor
    start: Tensor
    floats: Tensor
    tables: Mapping[str, Tensor]
    layers: Mapping[str, QuantizedLinear]
    vectors: Mapping[str, Tensor]
    fixed: Mapping[str, Tensor]
    transformed: bool = False
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    state: FinisherState = field(default_factory=NoState)
    report: Callable[[float], None] = lambda done: None


@dataclass(frozen=True, eq=False)
class FinishResult:
    """What a finish hands back.

    Args:
        layers: quantized linears by path.
        vectors: norms and biases, by parameter name.
        losses: of each window, before and after.
    """

    layers: dict[str, QuantizedLinear]
    vectors: dict[str, Tensor]
    losses: tuple[tuple[float, float], ...]
