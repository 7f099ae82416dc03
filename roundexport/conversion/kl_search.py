"""Tune until a KL is kept: plan, tune, export, measure, correct the plan; leaves the artifact that keeps it.

    OUT/rounds/rounds.json        the floor, and what every round was allowed, foretold and measured
    OUT/rounds/kept               calibration samples and scores of layers, which every round needs
    OUT/rounds/floor, 1, 2, …     artifacts; a package is made beside one to be measured, and dropped
    OUT/artifact                  the round that was taken; the others are dropped

How a plan is corrected: kl_rounds.py.  What is measured is what `verify` measures, on the same held-out text: a whole
package of the first target on its own runtime, activations and tables included.  An interrupted search goes on: rounds
that were measured are not tuned again, and the one that was at work goes on from its own partial artifact.  So does one
that is asked for another KL: its rounds are measurements, whatever they were made for.  Of another held-out text they
are no measurements, but their artifacts are measured on it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from roundexport.calibration.kept_samples import kept_folder, samples_kept
from roundexport.errors import UnsupportedError, UsageError
from roundexport.formats.artifact import Artifact
from roundexport.model.checkpoint import Checkpoint
from roundexport.progress import Progress
from roundexport.storage.atomic import replace_file
from roundexport.targets.export import export
from roundexport.targets.interface import load_target
from roundexport.tuning.head_rounding import FEW_BITS
from roundexport.tuning.settings import TuneSettings
from roundexport.verification.heldout import heldout_digest
from roundexport.verification.report import DecoderQuality
from roundexport.verification.verify import verify

from .kl_rounds import ROUNDS, KlRounds, Round, told
from .tune import tune


def searches(settings: TuneSettings) -> bool:
    """Whether `convert` searches, and does not go by a gain that is given."""
    return settings.target_kl is not None and settings.kl_gain is None


def rounds_of(folder: Path) -> Path:
    """The folder of the rounds in a conversion's."""
    return folder / "rounds"


def rounds_at_most(folder: Path, settings: TuneSettings) -> int:
    """How many rounds there may be at once: those for another KL that was asked for in the folder are kept, too."""
    found = _read(folder)
    same = found.get("target_kl") == settings.target_kl
    return ROUNDS + (found.get("earlier", 0) if same else len(found.get("rounds", ())))


def may_change(folder: Path) -> set[str]:
    """Settings that a conversion's folder takes with other values: the KL, while a plan is searched for."""
    return {"target_kl"} if rounds_of(folder).exists() and not (folder / "artifact").exists() else set()


def floor_of(settings: TuneSettings) -> TuneSettings:
    """What no plan of the blocks can do better than: the most accurate of the schemes in all of them, to nearest.

    Tables have the scheme that they have in the rounds, 8 bits where a plan chooses theirs, and those of few bits are
    rounded as rounds do it, which to nearest is not (decision 0078).
    """
    asked = settings.schemes
    schemes = asked.search.schemes(asked.linears)
    finest = max(schemes, key=lambda scheme: (scheme.bits, -(scheme.group_size or 1 << 30)))
    return dataclasses.replace(
        settings.without_budget(), bits=finest.bits, group_size=finest.group_size,
        embedding_group_size=asked.tables.group_size if asked.has_tables else "auto",
        recipe="rtn" if (asked.embedding_bits or 8) > FEW_BITS else "light",
        algorithm=None, transform=None, finish=None, steps=None, method_settings=(),
    )  # fmt: skip


@dataclass(frozen=True)
class KlSearch:
    """A search for the plan that keeps ``settings.target_kl``.

    Args:
        checkpoint: the float model, a decoder.
        folder: where ``artifact`` is to be.
        settings: how to tune, with a target KL.
        target: whose package is measured.
        text: held-out text file; None: the bundled one.
        shown: where progress is reported.
        graph: settings of the package's graph, as the conversion's have them.
        cluster: workers that share the tuning, see :func:`roundexport.conversion.tune.tune`.

    Raises:
        UnsupportedError: the model is not a decoder: nothing else loses nats per token.
    """

    checkpoint: Checkpoint
    folder: Path
    settings: TuneSettings
    target: str
    text: str | Path | None
    shown: Progress
    graph: Mapping[str, bool] = field(default_factory=dict)
    cluster: str | None = None

    def __post_init__(self) -> None:
        if self.checkpoint.task != "generate":
            raise UnsupportedError(
                f"target_kl is for decoders; {self.checkpoint.location} is a model to {self.checkpoint.task}, whose "
                "loss is not a KL: give --target-bits, and a gate such as --min-cosine"
            )

    def run(self) -> None:
        """Leave the artifact that keeps the target in ``folder/artifact``.

        Raises:
            UsageError: no plan keeps it.
        """
        with nullcontext() if kept_folder() else samples_kept(self._rounds / "kept"):
            self._search()

    def _search(self) -> None:
        floor, measured, earlier = self._begun()
        try:
            rounds = KlRounds(self._asked, floor, self.settings.usual_gain, measured, earlier)
        except UsageError:
            if not measured:  # nothing that took long
                shutil.rmtree(self._rounds)
            raise
        self._record(rounds)
        while not rounds.done():
            allowed = rounds.next_allowed()
            name = str(len(rounds.rounds) + 1)
            gain = dataclasses.replace(self.settings, kl_gain=self._asked / allowed)
            with self.shown.stage(f"target KL {self._asked:g}, round {name}"):
                artifact = self._tuned(name, gain)
                tried = Round(allowed, _predicted(artifact), self._measured(artifact))
            rounds = dataclasses.replace(rounds, rounds=(*rounds.rounds, tried))
            self._record(rounds)
            self.shown.say(told(rounds.rounds))
        best = rounds.best()
        self._artifact(str(best + 1)).rename(self.folder / "artifact")
        shutil.rmtree(self._rounds)

    @property
    def _rounds(self) -> Path:
        return rounds_of(self.folder)

    @property
    def _asked(self) -> float:
        if self.settings.target_kl is None:
            raise UsageError("a search for a KL needs target_kl")
        return self.settings.target_kl

    def _begun(self) -> tuple[float, tuple[Round, ...], int]:
        """The floor, the rounds that were measured, and how many of them were made for another KL or text."""
        if found := _read(self.folder):
            floor, tried = found["floor"], tuple(Round(**one) for one in found["rounds"])
            changed = {name for name, value in self._question.items() if name not in found or found[name] != value}
            if not changed:
                return floor, tried, found["earlier"]
            shutil.rmtree(self._rounds / str(len(tried) + 1), ignore_errors=True)  # at work on what is asked no more
            if "text" in changed:
                with self.shown.stage("what rounds for another text lose on this one"):
                    floor, *losses = (self._measured(self._artifact(name)) for name in ("floor", *_names(tried)))
                tried = tuple(dataclasses.replace(one, kl=kl) for one, kl in zip(tried, losses, strict=True))
            return floor, tried, len(tried)
        plain = floor_of(self.settings)
        with self.shown.stage(f"what no plan can save: {plain.bits} bits, group {plain.group_size} in every block"):
            floor = self._measured(self._tuned("floor", plain))
        self.shown.say(f"{plain.bits} bits, group {plain.group_size} in every block lose {floor:.5f} nats per token")
        return floor, (), 0

    @cached_property
    def _question(self) -> dict[str, Any]:
        return {"target_kl": self._asked, "text": heldout_digest(self.text, self.shown)}

    def _artifact(self, name: str) -> Path:
        return self._rounds / name / "artifact"

    def _tuned(self, name: str, settings: TuneSettings) -> Path:
        artifact = self._artifact(name)
        if not artifact.exists():
            tune(self.checkpoint.location, artifact, settings, cluster=self.cluster, progress=self.shown)
        return artifact

    def _measured(self, artifact: Path) -> float:
        package = artifact.with_name("package")
        if not package.exists():
            export(
                artifact, package, to=self.target, model=self.checkpoint.location,
                settings=load_target(self.target).known(self.graph), max_ram=self.settings.max_ram,
                progress=self.shown,
            )  # fmt: skip
        quality = verify(
            package, against=self.checkpoint.location, text=self.text, max_ram=self.settings.max_ram,
            progress=self.shown,
        ).quality  # fmt: skip
        shutil.rmtree(package)
        if not isinstance(quality, DecoderQuality):
            raise UnsupportedError(f"target_kl is for decoders; what {package} loses is not a KL")
        return quality.kl.mean

    def _record(self, rounds: KlRounds) -> None:
        measured = {"floor": rounds.floor, "rounds": [dataclasses.asdict(tried) for tried in rounds.rounds]}
        kept = {**self._question, **measured, "earlier": rounds.earlier}
        self._rounds.mkdir(exist_ok=True)
        replace_file(self._rounds / "rounds.json", (json.dumps(kept, indent=1) + "\n").encode())


def _read(folder: Path) -> dict[str, Any]:
    """What a search in a conversion's folder has measured; empty where there is none."""
    note = rounds_of(folder) / "rounds.json"
    return dict(json.loads(note.read_text(encoding="utf-8"))) if note.exists() else {}


def _names(rounds: Sequence[Round]) -> list[str]:
    return [str(number + 1) for number in range(len(rounds))]


def _predicted(artifact: Path) -> float:
    """The sum of the scores of the plan that an artifact was tuned by."""
    plan = Artifact.open(artifact, check_hashes=False).manifest.algorithm["settings"]["mix"]
    return sum(float(row["score"]) for row in plan["rows"])
