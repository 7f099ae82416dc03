"""Recipes for encoders as a whole: what they refuse, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from roundexport import TuneSettings
from roundexport.conversion import encoder_recipes
from roundexport.conversion.tune import tune
from roundexport.errors import UnsupportedError, UsageError
from roundexport.model.checkpoint import Checkpoint
from roundexport.tuning.recipes import resolve


@pytest.mark.parametrize(
    "asked",
    [{"bits": 8}, {"group_size": 64}, {"algorithm": "gram"}, {"target_bits": 4.0}, {"embedding_bits": None},
     {"method_settings": ("gram.sweeps=2",)}, {"device": "cuda"}],
)  # fmt: skip
@pytest.mark.parametrize("recipe", ["bct", "w8a8"])
def test_settings_that_would_be_ignored_are_refused(
    models: Callable[[str], Path], recipe: str, asked: dict[str, Any]
) -> None:
    checkpoint, ((name, _),) = Checkpoint.open(str(models("bert"))), asked.items()
    with pytest.raises(UsageError, match=f"recipe {recipe} settles {name} itself"):
        encoder_recipes.check(checkpoint, TuneSettings(recipe=recipe, **asked))
    encoder_recipes.check(checkpoint, TuneSettings(recipe=recipe, group_size=None, num_samples=3, seed=7, max_ram=8))


def test_neither_is_shared_and_tune_has_nothing_to_do_for_w8a8(models: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(models("bert")))
    with pytest.raises(UsageError, match="leave cluster local:2 out"):
        encoder_recipes.check(checkpoint, TuneSettings(recipe="bct"), "local:2")
    with pytest.raises(UsageError, match="take convert"):
        tune(models("bert"), tmp_path / "artifact", TuneSettings(recipe="w8a8"))


@pytest.mark.parametrize(
    ("recipe", "family", "reason"),
    [("bct", "llama", "is for models that embed texts"), ("w8a8", "llama", "is for models that embed texts"),
     ("bct", "modernbert", "of BERT models")],
)  # fmt: skip
def test_models_that_are_not_taken(models: Callable[[str], Path], recipe: str, family: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        encoder_recipes.check(Checkpoint.open(str(models(family))), TuneSettings(recipe=recipe))


def test_they_are_not_composed_of_methods() -> None:
    with pytest.raises(UsageError, match="makes an encoder as a whole"):
        resolve(TuneSettings(recipe="bct"))
    with pytest.raises(UsageError, match="known: rtn, light, default, best, bct, w8a8"):
        resolve(TuneSettings(recipe="nothing"))
