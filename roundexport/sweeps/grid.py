"""Which runs a sweep has: every model with every recipe, bit width and group size, each named by its content.

    OUT/runs/<model>-<recipe>-<bits>-g<group>-<sha256 of the request>

The request is what `convert` would record: the hash of the model, all settings with files by their content, the
targets, the held-out text where one is named, and the versions of the libraries.  Equal requests are one run; a changed
file is another one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roundexport.calibration.mixture import anywhere
from roundexport.conversion.package_size import package_bytes
from roundexport.environment.versions import library_versions
from roundexport.errors import UsageError
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.side_files import side_files_digest
from roundexport.progress import Progress
from roundexport.storage.tensor_cache import key_of
from roundexport.tuning.chosen_methods import reads_text, takes_steps
from roundexport.tuning.recipes import RECIPES, resolve
from roundexport.tuning.settings import TuneSettings
from roundexport.verification.heldout import heldout_digest

_KEY = 10  # digits of a hash in a name
_RECIPES_DECIDE = ("recipe", "algorithm", "transform", "finish", "method_settings", "num_samples")


@dataclass(frozen=True)
class Axes:
    """What is varied.

    Args:
        recipes: compositions of methods.
        bits: bit widths.
        group_sizes: weights that share a scale; None is a whole row.

    Raises:
        UsageError: an axis is empty, or a recipe is unknown.
    """

    recipes: tuple[str, ...] = ("default",)
    bits: tuple[int, ...] = (4,)
    group_sizes: tuple[int | None, ...] = (128,)

    def __post_init__(self) -> None:
        for name in ("recipes", "bits", "group_sizes"):
            if not getattr(self, name):
                raise UsageError(f"{name} must name at least one value")
        unknown = [recipe for recipe in self.recipes if recipe not in RECIPES]
        if unknown:
            raise UsageError(f"unknown recipe {unknown[0]!r}; known: {', '.join(RECIPES)}")

    def settings(self, base: TuneSettings) -> list[TuneSettings]:
        """Every combination that is another tuning, with all else as in ``base``; steps where something takes any.

        Raises:
            UsageError: there are steps, and nothing that takes any.
        """
        plain = dataclasses.replace(base, steps=None)
        made: dict[Hashable, TuneSettings] = {}
        for recipe, bits, group_size in itertools.product(self.recipes, self.bits, self.group_sizes):
            one = dataclasses.replace(plain, recipe=recipe, bits=bits, group_size=group_size)
            one = dataclasses.replace(one, steps=base.steps) if takes_steps(one) else one
            made.setdefault(_tuning(one), one)
        if base.steps is not None and all(one.steps is None for one in made.values()):
            raise UsageError(
                f"steps {base.steps} do nothing: no method of recipes {', '.join(self.recipes)} has any; leave "
                "--steps out"
            )
        return list(made.values())


def _tuning(settings: TuneSettings) -> Hashable:
    """What is done, whichever recipe it is asked for by: with an algorithm of one's own several are the same."""
    samples = settings.samples if reads_text(settings) else None
    rest = tuple(value for name, value in vars(settings).items() if name not in _RECIPES_DECIDE)
    return resolve(settings), settings.schemes, samples, rest


@dataclass(frozen=True)
class SweepRun:
    """A run of a sweep; can be pickled.

    Args:
        model: folder, file or hub id.
        called: the model in names and tables.
        settings: how it is tuned.
        targets: what it is exported to.
        text: held-out text; None: the one that comes with this package.
        name: of its folder.
        folder: where it is made.
        samples: folder of samples that runs share.
        disk: bytes that it leaves, about.
    """

    model: str
    called: str
    settings: TuneSettings
    targets: tuple[str, ...]
    text: str | None
    name: str
    folder: Path
    samples: Path
    disk: float = 0.0

    def about(self) -> dict[str, Any]:
        """What tells it from the others, for tables."""
        settings = self.settings
        return {"model": self.called, "recipe": settings.recipe, "bits": settings.bits, "group": settings.group_size}


def runs_of(
    models: Sequence[str | Path],
    axes: Axes,
    base: TuneSettings,
    targets: Sequence[str],
    out: Path,
    text: str | Path | None = None,
    progress: bool | Progress = False,
) -> list[SweepRun]:
    """The runs of a sweep, each once.

    Raises:
        UsageError: no model, two of the same name that are not the same, or no held-out text where one is named.
        CheckpointError: a model cannot be opened.
    """
    if not models:
        raise UsageError("a sweep needs at least one model")
    found: dict[str, SweepRun] = {}
    called: dict[str, str] = {}
    held_out = None if text is None else _found(text)
    said = {} if text is None else {"text": heldout_digest(text, Progress.of(progress))}
    for model in models:
        checkpoint = Checkpoint.open(model, part=base.part, progress=progress, max_ram=base.max_ram)
        checkpoint.identify(Progress.of(progress))
        name = Path(str(model).rstrip("/")).stem if Path(model).is_file() else Path(str(model).rstrip("/")).name
        if called.setdefault(name, checkpoint.digest) != checkpoint.digest:
            raise UsageError(f"two different models are called {name}; rename one folder, so that tables can tell them")
        for settings in axes.settings(base):
            key = key_of(
                model=checkpoint.digest, side_files=side_files_digest(checkpoint.folder),
                settings=settings.by_content(), targets=sorted(targets),
                versions=library_versions(), **said,
            )[:_KEY]  # fmt: skip
            group = "row" if settings.group_size is None else settings.group_size
            folder = f"{name}-{settings.recipe}-{settings.bits}-g{group}-{key}"
            found[folder] = SweepRun(
                _found(model), name, _anywhere(settings), tuple(targets), held_out, folder, out / "runs" / folder,
                out / "samples", (1 + len(targets)) * package_bytes(checkpoint, settings),
            )  # fmt: skip
    return list(found.values())


def _anywhere(settings: TuneSettings) -> TuneSettings:
    """The same with paths that a worker finds, which has another working folder."""
    rules = None if settings.rules is None else _found(settings.rules)
    return dataclasses.replace(settings, rules=rules, calibration=anywhere(settings.calibration))


def _found(named: str | Path) -> str:
    """A path as an absolute one; a hub id or a URL as it is."""
    return str(Path(named).absolute()) if Path(named).exists() else str(named)
