"""The contract between a method (a file of algorithms/) and the run that calls it.

A method's file defines one value, ``METHOD``, whose class says the method's role:

    rounding/      METHOD = RoundingMethod(...)     rounds the linears of one block
    transforms/    METHOD = BlockTransform(...)     makes one block easier to round, before it is rounded
                   METHOD = ModelTransform(...)     the same, trained on all blocks at once
    finishers/     METHOD = Finisher(...)           tunes the whole model after its blocks

``METHOD`` names the class of the method's settings and its functions, and every optional capability is a field of it
with a default.  The classes are generic in the settings, so that mypy checks a file where it defines ``METHOD``: the
functions must take these settings, and the settings must say what the method costs (:class:`MethodSettings`).  A
Protocol for the module would be checked nowhere, as a plug-in is never imported by name.

What the functions take and return stands first; that of finishers in finishing.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from roundexport import plugins
from roundexport.model.block_call import BlockCall
from roundexport.model.blocks import linears, weight_of

if TYPE_CHECKING:
    from roundexport.model.blocks import Stack
    from roundexport.quant.quantized_linear import QuantizedLinear
    from roundexport.quant.spec import QuantSpec, ScaleDtype

    from .finishing import FinishInputs, FinishResult
    from .parts import Parts


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
        parts: given the samples of a batch, who does the parts of the work; None: this process (parts.py).
        fisher: S [N, R] of linears by name in the block, where the method asked for it (tuning/output_fisher.py).
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
    parts: Callable[[int], AbstractContextManager[Parts]] | None = None
    fisher: Mapping[str, Tensor] = field(default_factory=dict)

    def weights_of(self, start: int, values: Tensor) -> Tensor:
        """The mask of what enters a linear, for the samples from ``start`` on.

        Args:
            start: number of the first of these samples.
            values: what enters, [b, S, K]; of a block that looks at what another half gave, that half's positions
                where they enter.
        """
        mask = self.mask[start : start + len(values)].to(self.device)
        own = mask.shape[1] - self.call.carried
        return mask if not self.call.carried else mask[:, :own] if values.shape[1] == own else mask[:, own:]

    @classmethod
    def none(cls, seed: int, device: torch.device) -> BlockInputs:
        """What a method gets that needs no calibration: no samples."""
        nothing = torch.empty(0, 0, 0)
        return cls(BlockCall((), {}, False), nothing, nothing, nothing, torch.empty(0, 0), seed, device)


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
        layer_losses: loss before and after of single linears, where the method measures those; they count for the
            linear instead of its block's.
        note: what its user must be told of the block.
    """

    layers: dict[str, QuantizedLinear]
    loss_before: float | None = None
    loss_after: float | None = None
    outputs_written: bool = False
    layer_losses: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    note: str = ""


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


class MethodSettings(Protocol):
    """Settings of any method: a frozen dataclass whose fields all have defaults; they also say what the method costs.

    Fields called ``steps`` and ``batch_size`` take the values that `tune` was given.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def forward_passes(self, samples: int) -> float:
        """Forwards of one sample through a block that the method takes per block."""

    def rtn_equivalents(self) -> float:
        """Work on a block's weights that does not depend on tokens, in roundings of all of them to nearest."""

    def peak_floats(self, size: BlockSize) -> float:
        """Float32 values held at most, besides the block and one batch of hidden states."""


class ModelTransformSettings(Protocol):
    """Settings of a transform that is trained on the whole model."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def batch_size(self) -> int:
        """Samples per step."""

    def forward_passes(self, samples: int) -> float:
        """Forwards of one sample through the whole model that training takes."""

    def whole_model_floats(self, weights: int, outputs: int, vocabulary: int, length: int) -> float:
        """Float32 values held at most, besides the model.

        Args:
            weights: of all linears in blocks.
            outputs: their rows.
            vocabulary: rows of lm_head.
            length: tokens per sample.
        """


class FinisherSettings(MethodSettings, Protocol):
    """Settings of a finisher."""

    @property
    def batch_size(self) -> int:
        """Samples per step."""

    @property
    def written(self) -> int:
        """Samples that a decoder writes itself, per calibration sample."""

    def fitted(self, size: BlockSize) -> Self:
        """The same with the largest unit of work that fits in ``size.max_bytes``."""


Specs = Mapping[str, "QuantSpec"]
"""Scheme by the linear's name in its block."""
S = TypeVar("S", bound=MethodSettings)
M = TypeVar("M", bound=ModelTransformSettings)
F = TypeVar("F", bound=FinisherSettings)
Report = Callable[[float], None]


@dataclass(frozen=True)
class SchemeNeeds:
    """Fields of `TuneSettings` that a rounding method needs at one value; None leaves a field to the user.

    Args:
        scale_dtype: dtype of stored scales.
        embedding_bits: bits of token embedding and lm_head.
        everything: also quantize tables and linears outside the blocks, norms and biases.
    """

    scale_dtype: ScaleDtype | None = None
    embedding_bits: int | None = None
    everything: bool | None = None

    def values(self) -> dict[str, Any]:
        """The fields that are needed, with their values."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def _always(settings: object) -> bool:
    """The default of `reads_quantized`; a task that is pickled names it."""
    del settings
    return True


def _no_samples(settings: object) -> int:
    """The default of `fisher_samples`; a task that is pickled names it."""
    del settings
    return 0


@dataclass(frozen=True)
class RoundingMethod(Generic[S]):
    """A method that rounds the linears of a block, one block at a time.

    Args:
        settings: class of its settings.
        tune_block: (block, inputs, specs, settings) -> the integers of the block's linears.  The block has its float
            weights, is on ``inputs.device`` and is not changed.
        needs_calibration: it looks at hidden states; if not, ``tune_block`` gets :meth:`BlockInputs.none`.
        computes_float_outputs: it can fill ``inputs.target`` itself, where ``inputs.float_outputs_ready`` is False.
        reads_quantized: given its settings, whether it looks at ``inputs.quantized_inputs``; where nobody does, they
            hold nothing, as no block's quantized outputs are computed.
        carries: it can tune blocks of a decoder whose hidden states have what an encoder gave behind them: it takes
            masks of a linear's inputs from :meth:`BlockInputs.weights_of`, and measures no outputs of blocks.
        scheme_needs: schemes that it needs; asking for another is refused.
        quantize_table: rounds a table [N, K] row by row; None rounds tables to nearest.
        parted: its work is done in parts (parts.py), so that a cluster can share it.
        fisher_samples: given its settings, from how many samples is measured what an error of each output costs the
            model (`BlockInputs.fisher`); 0: it does not look at that.
        head_rounder: (H of what enters lm_head, settings) -> what rounds rows of its weight at few bits; None: as a
            table.
    """

    settings: type[S]
    tune_block: Callable[[nn.Module, BlockInputs, Specs, S], BlockResult]
    needs_calibration: bool = True
    computes_float_outputs: bool = False
    reads_quantized: Callable[[S], bool] = _always
    carries: bool = False
    scheme_needs: SchemeNeeds = field(default_factory=SchemeNeeds)
    quantize_table: Callable[[Tensor, QuantSpec], QuantizedLinear] | None = None
    parted: bool = False
    fisher_samples: Callable[[S], int] = _no_samples
    head_rounder: Callable[[Tensor, S], Callable[[Tensor, QuantSpec], QuantizedLinear]] | None = None


@dataclass(frozen=True, eq=False)
class Transformed:
    """What a transform did to a block, beside changing the weights that are rounded.

    Args:
        changed: other parameters, by name in the block.
        row_factors: what the rows of a linear's weight were multiplied with [N], and so its outputs, by its name in the
            block; where it is missing they are what they were.
    """

    changed: Mapping[str, Tensor] = field(default_factory=dict)
    row_factors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockTransform(Generic[S]):
    """A transform that makes one block at a time easier to round.

    Args:
        settings: class of its settings.
        transform_block: (block, inputs, specs, settings) -> what it did.  The block is changed in place to an
            equivalent one.
        reads_target: it looks at ``inputs.target``; where it does not, a rounding method may compute it afterwards.
        reads_quantized: it looks at ``inputs.quantized_inputs``; where nobody does, they hold nothing.
        samples: (settings) -> how many calibration samples it looks at; None: all.
    """

    settings: type[S]
    transform_block: Callable[[nn.Module, BlockInputs, Specs, S], Transformed]
    reads_target: bool = True
    reads_quantized: bool = True
    samples: Callable[[S], int] | None = None


@dataclass(frozen=True)
class ModelTransform(Generic[M]):
    """A transform that is trained on all blocks at once, with the whole float model in memory.

    Args:
        settings: class of its settings.
        train_model: (model, stack, token ids [n, S], specs per block, settings, seed, report) -> factors.  The model is
            not changed.
        fold_block: (block, inputs, specs, the block's factors) -> what it did, as of ``transform_block``.
    """

    settings: type[M]
    train_model: Callable[[nn.Module, Stack, Tensor, Sequence[Specs], M, int, Report], Factors]
    fold_block: Callable[[nn.Module, BlockInputs, Specs, Mapping[str, Tensor]], Transformed]


@dataclass(frozen=True)
class Finisher(Generic[F]):
    """A method that tunes the whole model after its blocks.

    Args:
        settings: class of its settings.
        finish: (inputs, settings) -> new integers, norms and biases.
    """

    settings: type[F]
    finish: Callable[[FinishInputs, F], FinishResult]


def load_rounding(name: str) -> RoundingMethod[MethodSettings]:
    """The rounding method of this name.

    Raises:
        UsageError: no such method, or a method of another role; the text lists those that exist.
    """
    method: RoundingMethod[MethodSettings] = plugins.load_value("rounding", name, "METHOD", RoundingMethod)
    return method


def load_transform(name: str) -> BlockTransform[MethodSettings] | ModelTransform[ModelTransformSettings]:
    """The transform of this name.

    Raises:
        UsageError: as of :func:`load_rounding`.
    """
    method: BlockTransform[MethodSettings] | ModelTransform[ModelTransformSettings] = plugins.load_value(
        "transforms", name, "METHOD", BlockTransform, ModelTransform
    )
    return method


def load_finisher(name: str) -> Finisher[FinisherSettings]:
    """The finisher of this name.

    Raises:
        UsageError: as of :func:`load_rounding`.
    """
    method: Finisher[FinisherSettings] = plugins.load_value("finishers", name, "METHOD", Finisher)
    return method
