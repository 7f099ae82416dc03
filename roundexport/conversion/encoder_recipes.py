"""Recipes for encoders as a whole, which are not composed of methods: `bct` and `w8a8`.

    bct    the artifact is an integer encoder (integer_encoder/): weights of 4 bits on powers of two, rounded in Gram
           space for the integers that will meet them, and formats for what every linear reads.  Targets ship those
           integers, multiplied as integers (targets/*/integer_linear*.py); attention, GELU and norms stay floats
    w8a8   the artifact changes nothing; every package is exported as floats, proven, and then quantized by the target's
           own tool on the calibration samples (targets/w8a8.py): 8-bit weights and 8-bit inputs of products

Both settle schemes, scales and tables themselves, so settings of methods and schemes are refused.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from roundexport.calibration.samples import Calibration, load_calibration
from roundexport.environment.memory import MemoryLimit
from roundexport.errors import UnsupportedError, UsageError
from roundexport.integer_encoder.table_schemes import table_spec
from roundexport.model.integer_inputs import INPUT_SPREAD
from roundexport.model.skeleton import build_skeleton
from roundexport.model.weight_bytes import WeightBytes
from roundexport.progress import Progress
from roundexport.quant.spec import LinearInfo
from roundexport.schemes.layer_plan import make_plan
from roundexport.tuning.recipes import ENCODER_RECIPES
from roundexport.tuning.settings import TuneSettings
from roundexport.types import HEADLESS, OF_IMAGES

if TYPE_CHECKING:
    from roundexport.model.checkpoint import Checkpoint
    from roundexport.quant.spec import QuantSpec

_OWN = ("recipe", "calibration", "num_samples", "sample_len", "seed", "part", "group_size", "max_ram")
"""Settings that such a recipe reads; `group_size` only as none or the default, which both mean whole rows here."""

_WIDTHS, _INNERS = 9, 3  # tensors of all tokens that are held at once, of hidden_size and of intermediate_size


def check(checkpoint: Checkpoint, settings: TuneSettings, cluster: str | None = None) -> None:
    """Refuse a model or settings that a recipe for encoders cannot take.

    Raises:
        UsageError: a setting that the recipe would ignore.
        UnsupportedError: the model is not a float encoder of texts, or for `bct` not a BERT.
    """
    recipe, plain = settings.recipe, TuneSettings()
    if cluster is not None:
        raise UsageError(f"recipe {recipe} is done by this process alone; leave cluster {cluster} out")
    if checkpoint.imported is not None:
        raise UnsupportedError(
            f"{checkpoint.location} is quantized already; recipe {recipe} takes the float model it was made from"
        )
    usual = {"group_size": (None, plain.group_size)}
    for field in dataclasses.fields(TuneSettings):
        asked, allowed = getattr(settings, field.name), usual.get(field.name, (getattr(plain, field.name),))
        if asked not in allowed and (field.name not in _OWN or field.name in usual):
            raise UsageError(f"recipe {recipe} settles {field.name} itself, but {asked} was asked for; leave it out")
    if checkpoint.task not in HEADLESS or checkpoint.task in OF_IMAGES:
        raise UnsupportedError(
            f"recipe {recipe} is for models that embed texts; {checkpoint.location} is one to {checkpoint.task}"
        )
    if recipe == "bct":
        from roundexport.integer_encoder.float_encoder import check_kind

        check_kind(checkpoint)


def planned_layers(checkpoint: Checkpoint, settings: TuneSettings) -> tuple[tuple[LinearInfo, QuantSpec], ...]:
    """What will be quantized in an artifact, and how; nothing for `w8a8`."""
    if settings.recipe == "w8a8":
        return ()
    schemes = TuneSettings(algorithm="bct", group_size=None, scale_dtype="exponent8", embedding_bits=4, everything=True)
    planned = make_plan(build_skeleton(checkpoint), schemes.schemes, values=()).layers
    return tuple(
        (info, table_spec(info.out_features, info.in_features) if info.kind == "embedding" else spec)
        for info, spec in planned
    )


def samples(checkpoint: Checkpoint, settings: TuneSettings, shown: Progress) -> Calibration:
    """The calibration samples that the settings ask for."""
    with shown.stage(f"calibration samples: {settings.calibration}"):
        found = load_calibration(
            checkpoint,
            settings.calibration,
            num_samples=settings.samples,
            sample_len=settings.sample_len,
            seed=settings.seed,
        )
    for note in found.notes:
        shown.say(f"note: {note}")
    return found


def token_ids(calibration: Calibration) -> NDArray[np.int64]:
    """The samples of a model of texts, int64 [samples, length]."""
    return cast("NDArray[np.int64]", calibration.ids)


def make_artifact(checkpoint: Checkpoint, out: Path, settings: TuneSettings, shown: Progress) -> None:
    """Write the artifact of a recipe for encoders, of what :func:`check` lets pass.

    Raises:
        UsageError: ``out`` exists.
        WontFitError: it takes more than ``max_ram``.
        RoundexportError: activations that are not finite.
    """
    if settings.recipe == "w8a8":
        from roundexport.targets.float_artifact import write_float_artifact

        write_float_artifact(checkpoint, out)
        return
    from roundexport.integer_encoder.artifact import write_artifact
    from roundexport.integer_encoder.calibrate import IntegerSettings, calibrate
    from roundexport.integer_encoder.float_encoder import FloatEncoder
    from roundexport.integer_encoder.rounders import ForIntegers

    calibration = samples(checkpoint, settings, shown)
    _check_room(checkpoint, token_ids(calibration), settings)
    floats, how = FloatEncoder.of(checkpoint), IntegerSettings(input_spread=INPUT_SPREAD)
    with shown.stage("integers of every block") as stage:
        integers = calibrate(
            floats, token_ids(calibration), ForIntegers(), how, lambda share: stage.at(share, "of the blocks")
        )
    write_artifact(integers, floats, checkpoint, out, how, calibration.identity)


def _check_room(checkpoint: Checkpoint, ids: NDArray[np.int64], settings: TuneSettings) -> None:
    """Refuse `bct` where the model and a block's tensors on both sides take too much memory."""
    width, inner = (int(checkpoint.config.get(name) or 0) for name in ("hidden_size", "intermediate_size"))
    MemoryLimit(settings.max_ram).check(
        "recipe bct",
        {
            "the model as float32": WeightBytes.of(checkpoint).whole,
            "what a block's linears read, of all samples": 4 * ids.size * (_WIDTHS * width + _INNERS * inner),
        },
        advice="use fewer or shorter samples, or a machine with more memory",
    )


def is_encoder_recipe(settings: TuneSettings) -> bool:
    """Whether the settings ask for a recipe of this module."""
    return settings.recipe in ENCODER_RECIPES
