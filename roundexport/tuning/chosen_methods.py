"""The methods of a run with their settings: loaded by name, checked for their role, and what each records.

A transform changes a block to an equivalent one that rounds better.  What changes besides the weights to be rounded
(norms, biases, linears kept float) becomes overrides of the artifact.  The artifact's overrides are written at the end
of a run.  The run's state therefore holds them too, and a resumed run takes those of finished blocks from there.  The
float model's hidden states do not change, because the blocks are equivalent.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn

from roundexport.algorithms.interface import (
    BlockTransform,
    Factors,
    Finisher,
    FinisherSettings,
    MethodSettings,
    ModelTransform,
    ModelTransformSettings,
    RoundingMethod,
    Transformed,
    load_finisher,
    load_rounding,
    load_transform,
)
from roundexport.errors import UsageError
from roundexport.model.block_call import without_cache
from roundexport.model.blocks import find_stack, linears, weight_of
from roundexport.model.main_input import named
from roundexport.schemes.activation_loss import SAMPLES as SAMPLES_OF_ACTIVATIONS
from roundexport.schemes.allocate import SAMPLES as SAMPLES_SCORED

from .cost_model import Estimate
from .method_options import settings_of
from .recipes import ENCODER_RECIPES, resolve

if TYPE_CHECKING:
    from roundexport.algorithms.interface import BlockInputs, BlockSize
    from roundexport.quant.spec import QuantSpec

    from .settings import TuneSettings


@dataclass(frozen=True, eq=False)
class ChosenRounding:
    """The rounding method of a run."""

    name: str
    method: RoundingMethod[MethodSettings]
    settings: MethodSettings

    @classmethod
    def of(cls, name: str, settings: TuneSettings) -> ChosenRounding:
        """Load the method and read its settings.

        Raises:
            UsageError: no such rounding method, or settings that make no sense.
        """
        method = load_rounding(name)
        return cls(name, method, settings_of(name, method.settings, settings))

    def to_json(self) -> dict[str, Any]:
        """Name and settings."""
        return _described(self.name, self.settings)


@dataclass(frozen=True, eq=False)
class ChosenBlockTransform:
    """A transform that takes one block at a time."""

    name: str
    method: BlockTransform[MethodSettings]
    settings: MethodSettings

    def forward_passes(self, samples: int) -> float:
        """Forwards of one sample through a block that the transform takes in the block's turn."""
        return self.settings.forward_passes(samples)

    @property
    def reads_target(self) -> bool:
        """Whether it looks at the float block's outputs."""
        return self.method.reads_target

    @property
    def reads_quantized(self) -> bool:
        """Whether it looks at hidden states that come through quantized blocks."""
        return self.method.reads_quantized

    def to_json(self) -> dict[str, Any]:
        """Name and settings."""
        return _described(self.name, self.settings)

    def of_block(self, index: int) -> ChosenBlockTransform:
        """What a block's task needs of it: all."""
        del index
        return self

    def apply(self, block: nn.Module, index: int, inputs: BlockInputs, specs: Mapping[str, QuantSpec]) -> Transformed:
        """Transform a block in place.

        Args:
            block: the float block, on ``inputs.device``.
            index: the block's; not used.
            inputs: hidden states and target.
            specs: scheme by the linear's name in the block.

        Returns:
            What changed besides weights in ``specs``, in main memory.
        """
        del index
        return _in_main_memory(self.method.transform_block(block, inputs, specs, self.settings))


@dataclass(frozen=True, eq=False)
class ChosenModelTransform:
    """A transform that is trained on all blocks at once, before the first one's turn.

    Args:
        name: the method's.
        method: its functions.
        settings: its settings.
        factors: result of :meth:`train`; None before that.
    """

    name: str
    method: ModelTransform[ModelTransformSettings]
    settings: ModelTransformSettings
    factors: Factors | None = None

    def forward_passes(self, samples: int) -> float:
        """Forwards in a block's turn: none, the factors are there."""
        del samples
        return 0.0

    @property
    def reads_target(self) -> bool:
        """Whether it looks at the float block's outputs in the block's turn: it only folds."""
        return False

    @property
    def reads_quantized(self) -> bool:
        """Likewise of hidden states that come through quantized blocks."""
        return False

    def to_json(self) -> dict[str, Any]:
        """Name and settings, and losses once all blocks were trained."""
        described = _described(self.name, self.settings)
        if self.factors is not None:
            described["losses"] = [self.factors.loss_before, self.factors.loss_after]
        return described

    def of_block(self, index: int) -> ChosenModelTransform:
        """What a block's task needs of it: no other block's factors."""
        if self.factors is None:
            return self
        own = {index: self.factors.blocks.get(index, {})}
        return dataclasses.replace(self, factors=dataclasses.replace(self.factors, blocks=own))

    def bytes_held(self, model: nn.Module, length: int) -> float:
        """Memory that :meth:`train` takes beside the model, for samples of so many tokens; weights may be on meta."""
        matrices = [weight_of(module) for block in find_stack(model).blocks for module in linears(block).values()]
        head = model.get_output_embeddings()  # type: ignore[operator]
        rows = 0 if head is None else len(head.weight)
        weights, outputs = sum(matrix.numel() for matrix in matrices), sum(len(matrix) for matrix in matrices)
        return 4.0 * self.settings.whole_model_floats(weights, outputs, rows, length)

    def estimate(self, model: nn.Module, ids: Tensor) -> Estimate:
        """Time and memory that :meth:`train` will take, from one forward of the model, which is in memory."""
        batch = ids[: self.settings.batch_size].to(next(model.parameters()).device)
        since = time.monotonic()
        with torch.no_grad():
            model(**named(model, batch), **without_cache(model))
        seconds = (time.monotonic() - since) / len(batch) * self.settings.forward_passes(len(ids))
        return Estimate(seconds, psutil.Process().memory_info().rss + self.bytes_held(model, ids.shape[1]))

    def train(
        self,
        model: nn.Module,
        ids: Tensor,
        block_specs: Sequence[Mapping[str, QuantSpec]],
        seed: int,
        report: Callable[[float], None],
    ) -> Factors:
        """Train all blocks at once.

        Args:
            model: the float model, in memory; not changed.
            ids: token ids [n, S] of the calibration samples.
            block_specs: per block, scheme by the linear's name in the block.
            seed: of the order of samples.
            report: called with the share of the work that is done.
        """
        return self.method.train_model(model, find_stack(model), ids, block_specs, self.settings, seed, report)

    def apply(self, block: nn.Module, index: int, inputs: BlockInputs, specs: Mapping[str, QuantSpec]) -> Transformed:
        """Fold a block's factors in, in place; as :meth:`ChosenBlockTransform.apply`."""
        factors = {} if self.factors is None else self.factors.blocks.get(index, {})
        return _in_main_memory(self.method.fold_block(block, inputs, specs, factors))


ChosenTransform = ChosenBlockTransform | ChosenModelTransform


def choose_transform(name: str | None, settings: TuneSettings) -> ChosenTransform | None:
    """The transform of this name; None for none.

    Raises:
        UsageError: no such transform, or settings that make no sense.
    """
    if name is None:
        return None
    method = load_transform(name)
    if isinstance(method, ModelTransform):
        return ChosenModelTransform(name, method, settings_of(name, method.settings, settings))
    return ChosenBlockTransform(name, method, settings_of(name, method.settings, settings))


@dataclass(frozen=True, eq=False)
class ChosenFinisher:
    """The finisher of a run."""

    name: str
    method: Finisher[FinisherSettings]
    settings: FinisherSettings

    def fitted(self, size: BlockSize) -> ChosenFinisher:
        """The same with settings that fit in the memory there is, where the method can choose."""
        return dataclasses.replace(self, settings=self.settings.fitted(size))

    def to_json(self) -> dict[str, Any]:
        """Name and settings."""
        return _described(self.name, self.settings)


def choose_finisher(name: str | None, settings: TuneSettings) -> ChosenFinisher | None:
    """The finisher of this name; None for none.

    Raises:
        UsageError: no such finisher, or settings that make no sense.
    """
    if name is None:
        return None
    method = load_finisher(name)
    return ChosenFinisher(name, method, settings_of(name, method.settings, settings))


def reads_text(settings: TuneSettings) -> bool:
    """Whether a run with these settings looks at calibration text at all.

    Raises:
        UsageError: a setting makes no sense.
    """
    if settings.recipe in ENCODER_RECIPES:
        return True
    chosen = resolve(settings)
    method = ChosenRounding.of(chosen.algorithm, dataclasses.replace(settings, steps=None)).method
    return bool(
        method.needs_calibration or chosen.transform or chosen.finish or settings.chooses_bits or settings.activations
    )


def takes_steps(settings: TuneSettings) -> bool:
    """Whether anything in a run with these settings takes a number of steps.

    The steps that a user gives are those of the longest part: the finisher's where there is one, not of rounding's.

    Raises:
        UsageError: no such recipe or method.
    """
    chosen = resolve(settings)
    longest = load_finisher(chosen.finish) if chosen.finish else load_rounding(chosen.algorithm)
    kinds = [longest.settings, *([load_transform(chosen.transform).settings] if chosen.transform else [])]
    return any(field.name == "steps" for kind in kinds for field in dataclasses.fields(kind))


def with_samples(settings: TuneSettings) -> TuneSettings:
    """The settings with as many calibration samples as anything looks at, where no number was asked for.

    Raises:
        UsageError: a setting makes no sense.
    """
    if settings.num_samples is not None or settings.recipe in ENCODER_RECIPES:
        return settings
    chosen = resolve(settings)
    if chosen.finish or load_rounding(chosen.algorithm).needs_calibration:
        return settings
    read = [SAMPLES_SCORED] if settings.chooses_bits else []
    read += [SAMPLES_OF_ACTIVATIONS] if settings.activations else []
    if chosen.transform:
        method = load_transform(chosen.transform)
        if isinstance(method, ModelTransform) or method.samples is None:
            return settings
        own = dataclasses.replace(settings, method_settings=chosen.method_settings)
        read.append(method.samples(settings_of(chosen.transform, method.settings, own)))
    if not read:
        return settings
    try:
        return dataclasses.replace(settings, num_samples=min(settings.samples, max(read)))
    except UsageError:  # a text's share of so few samples is none
        return settings


def split_report(
    report: Callable[[float], None], first: float, second: float
) -> tuple[Callable[[float], None], Callable[[float], None]]:
    """Two reports for two pieces of work, in proportion to what they cost, that together make one."""
    part = first / (first + second) if first + second > 0 else 0.5
    return lambda done: report(done * part), lambda done: report(part + done * (1 - part))


def _described(name: str, settings: MethodSettings | ModelTransformSettings) -> dict[str, Any]:
    return {"name": name, "settings": dataclasses.asdict(settings)}


def _in_main_memory(done: Transformed) -> Transformed:
    changed, rows = (
        {name: tensor.float().cpu() for name, tensor in own.items()} for own in (done.changed, done.row_factors)
    )
    return Transformed(changed, rows)
