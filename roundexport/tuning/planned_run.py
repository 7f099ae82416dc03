"""What a run will be before its model is opened: its rounding method and its plan, from settings and config alone.

The skeleton is built when something first asks for the plan, and once: of a large model that takes a second.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from roundexport.model.blocks import weight_of
from roundexport.model.skeleton import build_skeleton
from roundexport.schemes.layer_plan import Plan, make_plan

from .chosen_methods import ChosenRounding
from .recipes import resolve

if TYPE_CHECKING:
    from torch import nn

    from roundexport.model.checkpoint import Checkpoint

    from .settings import TuneSettings


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """A run as it is planned.

    Args:
        checkpoint: the float model; of its weights only the shapes are looked at.
        settings: how it would be tuned.
    """

    checkpoint: Checkpoint
    settings: TuneSettings

    @cached_property
    def rounding(self) -> ChosenRounding:
        """The rounding method, with what its recipe sets.

        Raises:
            UsageError: no such recipe or method, or settings that make no sense.
        """
        composition = resolve(self.settings)
        own = dataclasses.replace(self.settings, steps=None, method_settings=composition.method_settings)
        return ChosenRounding.of(composition.algorithm, own)

    @property
    def fisher_samples(self) -> int:
        """From how many samples of 512 tokens is measured what errors of outputs cost the model; 0: it is not."""
        return self.rounding.method.fisher_samples(self.rounding.settings)

    @cached_property
    def plan(self) -> Plan:
        """What is quantized and in which schemes; with bits chosen per layer those of ``bits``.

        Raises:
            UsageError, SpecError, CheckpointError, UnsupportedError: what `Job.of` would raise without the weights.
        """
        settled = self.settings.settled(self.rounding.method.scheme_needs.values(), self.rounding.name)
        return make_plan(self._skeleton, settled.schemes, values=())

    @property
    def vocabulary(self) -> int:
        """Rows of lm_head; 0 where there is none."""
        head: Any = self._skeleton.get_output_embeddings()  # type: ignore[operator]
        return 0 if head is None else len(weight_of(head))

    @cached_property
    def _skeleton(self) -> nn.Module:
        return build_skeleton(self.checkpoint)
