"""Which of the targets asked for take a model, found before anything is tuned; and what becomes of the others.

    named by the user (--to)    one that refuses stops everything; the text names the command for the others
    asked for by default        it is left out, loudly, and the others are made; refused only where none is left

What is found is what lowering the captured program for a target finds, and what a target says of single layers in the
schemes that the settings plan for them (targets/check.py).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from roundexport import plugins
from roundexport.errors import UnsupportedError, UsageError
from roundexport.kernels.native.library import built
from roundexport.targets.check import check_layers, dry_run
from roundexport.targets.interface import load_target
from roundexport.tuning.planned_run import PlannedRun
from roundexport.types import EMBEDS, KERNELS

from . import encoder_recipes
from .encoder_recipes import is_encoder_recipe
from .importing import imported_layers

if TYPE_CHECKING:
    from pathlib import Path

    from roundexport.model.checkpoint import Checkpoint
    from roundexport.quant.spec import LinearInfo, QuantSpec
    from roundexport.tuning.settings import TuneSettings

DEFAULT = ("onnx", "openvino")


@dataclass(frozen=True)
class Asked:
    """Targets that are asked for.

    Args:
        names: each once.
        by_name: the user named them; else they are the default.

    Raises:
        UsageError: an unknown target, none, or one twice.
    """

    names: tuple[str, ...]
    by_name: bool

    def __post_init__(self) -> None:
        known = plugins.names("targets")
        unknown = [name for name in self.names if name not in known]
        if unknown or not self.names or len(set(self.names)) != len(self.names):
            raise UsageError(f"--to {','.join(self.names)!r}: name each target once; known: {', '.join(known)}")

    @classmethod
    def of(cls, to: str | Sequence[str] | None) -> Asked:
        """From a list, or names between commas; None: the default."""
        if to is None:
            return cls(DEFAULT, by_name=False)
        return cls(tuple(name.strip() for name in to.split(",")) if isinstance(to, str) else tuple(to), by_name=True)


def graph_settings(asked: Asked, settings: TuneSettings, inputs_embeds: bool, kernels: bool) -> dict[str, bool]:
    """Settings of the packages' graphs, by name, each for the targets that have it; checked before anything is tuned.

    Args:
        asked: the targets.
        settings: how it will be tuned.
        inputs_embeds: whether graphs are to read vectors.
        kernels: whether products are to run by roundexport's own operator.

    Raises:
        UsageError: no target knows that operator, or the recipe has products of its own.
        UnsupportedError: it has not been built on this machine.
    """
    if kernels:
        if not any(load_target(name).known({KERNELS: True}) for name in asked.names):
            raise UsageError(f"kernels: {', '.join(asked.names)} does not know roundexport's own operator; onnx does")
        if is_encoder_recipe(settings):
            raise UsageError(f"kernels: recipe {settings.recipe} has products of its own; leave kernels out")
        built()
    return {name: True for name, wanted in ((EMBEDS, inputs_embeds), (KERNELS, kernels)) if wanted}


def refusals(
    checkpoint: Checkpoint, settings: TuneSettings, targets: Sequence[str], inputs_embeds: bool = False
) -> dict[str, str]:
    """Why targets will not take a model, by target; of those that will, nothing.

    Args:
        checkpoint: the float model.
        settings: how it will be tuned.
        targets: to ask.
        inputs_embeds: whether graphs are to read vectors.

    Raises:
        UsageError, SpecError, CheckpointError, UnsupportedError: what tuning would refuse, whatever the target.
    """
    found = dict(dry_run(checkpoint, targets, embeds=inputs_embeds).refused)
    if left := [name for name in targets if name not in found]:
        layers = _layers(checkpoint, settings)
        for name in left:
            try:
                check_layers(load_target(name), name, layers)
            except UnsupportedError as error:
                found[name] = str(error)
    return found


def _layers(checkpoint: Checkpoint, settings: TuneSettings) -> tuple[tuple[LinearInfo, QuantSpec], ...]:
    if checkpoint.imported is not None:
        return imported_layers(checkpoint)
    if is_encoder_recipe(settings):
        return encoder_recipes.planned_layers(checkpoint, settings)
    return PlannedRun(checkpoint, settings).plan.layers


def settle(asked: Asked, refused: Mapping[str, str], model: str | Path, out: str | Path) -> list[str]:
    """Sentences on the targets that are left out; none where every target takes the model.

    Args:
        asked: the targets.
        refused: why some refuse, by target.
        model: as the user named it.
        out: the conversion's folder, likewise.

    Raises:
        UnsupportedError: a target that the user named refuses, or every target does; each reason is told once.
    """
    left = [name for name in asked.names if name not in refused]
    if refused and (asked.by_name or not left):
        reasons: dict[str, list[str]] = {}
        for name, why in refused.items():
            reasons.setdefault(why, []).append(name)
        told = "; ".join(f"{' and '.join(names)}: {why}" for why, names in reasons.items())
        command = f"roundexport convert {shlex.quote(str(model))} {shlex.quote(str(out))} --to {','.join(left)}"
        advice = f"; nothing was tuned. For {' and '.join(left)}: {command} (and your other options)" if left else ""
        raise UnsupportedError(f"{model} cannot be exported to {told}{advice}")
    return [f"LEFT OUT: {name} cannot take this model: {why}" for name, why in refused.items()]
