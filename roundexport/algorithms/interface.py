"""What methods are given and hand back: the contract between the files of algorithms/ and the run that calls them.

    tune_block(block, inputs: BlockInputs, specs, settings) -> BlockResult      rounds a block's linears
    finish(inputs: FinishInputs, settings) -> FinishResult                      tunes the whole model after its blocks

Transformations have theirs in chosen_methods.py.  A method's settings say what it will take of a block: cost and
memory, from its :class:`BlockSize`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from roundexport.model.blocks import linears, weight_of

if TYPE_CHECKING:
    from roundexport.model.block_call import BlockCall
    from roundexport.model.streamed_model import StreamedModel
    from roundexport.quant.quantized_linear import QuantizedLinear


@dataclass(frozen=True, eq=False)
class BlockInputs:
    """What an algorithm is given of one block; tensors are float32 [samples, length, H] in main memory.

    Args:
        call: how the block is called.
        quantized_inputs: hidden states that enter it when everything before it is quantized.
        float_inputs: hidden states that enter it in the float model.
        target: outputs of the float block for ``float_inputs``.
        float_outputs_ready: ``target`` is filled; if not, a method that computes float outputs must fill it.
        quantized_output_buffer: where a method may write the quantized block's outputs for ``quantized_inputs``; None
            when they are not needed.
        mask: [samples, length], 1 for positions that count, 0 for padding and, in decoders, the last of each sample.
        seed: seed of everything random in tuning this block.
        device: where to compute.
        report: called after every step with the share of the work that is done, 0 to 1.
        max_bytes: memory limit of the process; None means no limit.
    """

    call: BlockCall
    quantized_inputs: Tensor
    float_inputs: Tensor
    target: Tensor
    mask: Tensor
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    report: Callable[[float], None] = lambda done: None
    float_outputs_ready: bool = True
    quantized_output_buffer: Tensor | None = None
    max_bytes: int | None = None


@dataclass(frozen=True)
class BlockSize:
    """How large a block is, and what it is tuned on.

    Args:
        weights: numbers in the matrices of all its linears.
        outputs: their rows.
        widest: the largest K among them.
        hidden: width of hidden states.
        samples: calibration samples.
        length: tokens per sample.
        max_bytes: memory limit; None means no limit.
        blocks: how many there are of its kind.
        vocabulary: rows of lm_head; 0 where there is none.
    """

    weights: int
    outputs: int
    widest: int
    hidden: int
    samples: int
    length: int
    max_bytes: int | None = None
    blocks: int = 1
    vocabulary: int = 0

    @classmethod
    def of(cls, block: nn.Module, samples: int, length: int) -> BlockSize:
        """Of a block; hidden states are as wide as the first linear's input."""
        shapes = [weight_of(module).shape for module in linears(block).values()]
        return cls(
            weights=sum(rows * width for rows, width in shapes),
            outputs=sum(rows for rows, _ in shapes),
            widest=max(width for _, width in shapes),
            hidden=shapes[0][1],
            samples=samples,
            length=length,
        )


@dataclass(frozen=True, eq=False)
class BlockResult:
    """What an algorithm hands back.

    Args:
        layers: quantized weights by the linear's name in the block.
        loss_before: mean squared error of the block's output after rounding to nearest, where it was measured.
        loss_after: the same with the weights returned, over the same samples.
        outputs_written: ``inputs.quantized_output_buffer`` holds the block's outputs with these weights.
    """

    layers: dict[str, QuantizedLinear]
    loss_before: float | None = None
    loss_after: float | None = None
    outputs_written: bool = False


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
class Factors:
    """What was trained for all blocks at once.

    Args:
        blocks: block's index -> logarithms of factors, float32 in main memory, by a name that the method gives them.
        loss_before: the model's loss without them.
        loss_after: with them.
    """

    blocks: Mapping[int, Mapping[str, Tensor]]
    loss_before: float
    loss_after: float


@dataclass(frozen=True, eq=False)
class FinishInputs:
    """What a finish is given.

    Args:
        weights: the float model; lm_head is in memory, blocks are taken as they are needed.
        calls: how each block is called.
        ids: calibration samples [n, S].
        mask: [n, S], 1 where a position counts.
        start: hidden states that enter the first block behind quantized tables, [n, S, H].
        floats: those of the float model.
        tables: quantized values of what lies behind the blocks, lm_head among it, by parameter name.
        layers: quantized linears by path.
        vectors: norms and biases inside blocks as they are now, by parameter name; they are tuned.
        fixed: other parameters inside blocks that are no longer the float model's, by parameter name.
        transformed: the layers are roundings of other weights than the float model's.
        seed: of the order of samples.
        device: where to compute.
        state: where to write down what is half done.
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
