"""Recipes: named compositions of methods, from the cheapest to the most accurate.

    rtn       round to nearest: no data, seconds for any model
    light     Gram space on an eighth of the calibration samples, the grid searched once
    default   Gram space, block by block: two passes over the data, no training loop
    best      the same, and rows that make good each other's errors, by what those cost the model

and two for encoders as a whole, which are not composed of methods (conversion/encoder_recipes.py):

    bct       4-bit weights on powers of two, products of 8-bit integers
    w8a8      8-bit weights and inputs of products by the target's own tool

A recipe names a transform, a rounding method and a finisher; flags override each.  The composition is the same at every
bit width.  Variants that were better at one width (sign steps after gram at 2 bits, `teq_noise` at 3 and 4) gained one
to three percent for twice the time.  These defaults depend on the width:

    bits                      2             3             4, 8
    zero points               asymmetric    asymmetric    symmetric     settings.py: there for accuracy, here for speed
    rows keep their size      yes           yes           no            gram.py
    first rate of `finish`    1/100         1/140         1/200         _window.py

What each costs and loses is in docs/measurements.md.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

from roundexport.errors import UsageError


@dataclass(frozen=True)
class Composition:
    """What runs, by name of a file in ``roundexport/algorithms``.

    Args:
        algorithm: the rounding method.
        transform: equivalent transformation before it, or None.
        finish: tuning of the whole model after it, or None.
        method_settings: settings of these methods that are not their defaults, as of `TuneSettings`.
    """

    algorithm: str
    transform: str | None = None
    finish: str | None = None
    method_settings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**dataclasses.asdict(self), "method_settings": list(self.method_settings)}


RECIPES = {
    "rtn": Composition("rtn"),
    "light": Composition("gram", method_settings=("gram.searches=0",)),
    "default": Composition("gram"),
    "best": Composition("gram", method_settings=("gram.fisher_samples=32",)),
}

ENCODER_RECIPES = ("bct", "w8a8")


class Asked(Protocol):
    """The fields of `TuneSettings` that choose methods."""

    @property
    def recipe(self) -> str:
        """Name of the recipe."""

    @property
    def algorithm(self) -> str | None:
        """Rounding method in place of the recipe's."""

    @property
    def transform(self) -> str | None:
        """Transform in place of the recipe's; none for no transform."""

    @property
    def finish(self) -> str | None:
        """Finisher in place of the recipe's; none for no finisher."""

    @property
    def method_settings(self) -> tuple[str, ...]:
        """Settings of methods, after the recipe's own."""


def resolve(settings: Asked) -> Composition:
    """What the settings ask for: their recipe, with what they name themselves in its place or after it.

    Raises:
        UsageError: no such recipe, or one that is not composed of methods.
    """
    if settings.recipe in ENCODER_RECIPES:
        raise UsageError(f"recipe {settings.recipe} makes an encoder as a whole; convert does that")
    check_recipe(settings.recipe)
    recipe = RECIPES[settings.recipe]
    # Another method than the recipe's is meant as it is; the recipe's finish and settings belong to its own.
    own = settings.algorithm in (None, recipe.algorithm)
    return Composition(
        settings.algorithm or recipe.algorithm,
        _chosen(settings.transform, recipe.transform),
        _chosen(settings.finish, recipe.finish if own else None),
        (*(recipe.method_settings if own else ()), *settings.method_settings),
    )


def check_recipe(name: str) -> None:
    """Refuse a name that no recipe has.

    Raises:
        UsageError: it lists those that there are.
    """
    if name not in (*RECIPES, *ENCODER_RECIPES):
        raise UsageError(f"unknown recipe {name!r}; known: {', '.join([*RECIPES, *ENCODER_RECIPES])}")


def _chosen(asked: str | None, recipe: str | None) -> str | None:
    if asked is None:
        return recipe
    return None if asked == "none" else asked
