"""Tune until a KL is kept: plan, tune, export, measure, correct the plan; leaves the artifact that keeps it.

    OUT/rounds/rounds.json        the floor, and what every round was allowed, foretold and measured
    OUT/rounds/kept               calibration samples and scores of layers, which every round needs
    OUT/rounds/floor, 1, 2, …     artifacts; a package is made beside one to be measured, and dropped
    OUT/artifact                  the round that was taken; the others are dropped

How a plan is corrected: kl_rounds.py.  What is measured is what `verify` measures, on the same held-out text: a whole
package of the first target on its own runtime, activations and tables included.  An interrupted search goes on: rounds
that were measured are not tuned again, and the one that was at work goes on from its own partial artifact.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
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
from roundexport.verification.report import DecoderQuality
from roundexport.verification.verify import verify

from .kl_rounds import KlRounds, Round, told
from .tune import tune


def searches(settings: TuneSettings) -> bool:
    """Whether `convert` searches, and does not go by a gain that is given."""
    return settings.target_kl is not None and settings.kl_gain is None


def rounds_of(folder: Path) -> Path:
    """The folder of the rounds in a conversion's."""
    return folder / "rounds"


def floor_of(settings: TuneSettings) -> TuneSettings:
    """What no plan of the blocks can do better than: the most accurate of the schemes in all of them, to nearest.

    Tables are no plan's choice: they have the scheme that they have in the rounds, and those of few bits are rounded as
    rounds do it, which to nearest is not (decision 0078).
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
        floor, earlier = self._begun()
        try:
            rounds = KlRounds(self._asked, floor, self.settings.usual_gain, earlier)
        except UsageError:  # no plan of these schemes keeps the target, so nothing here is of use to another one
            shutil.rmtree(self._rounds)
            raise
        while not rounds.done():
            allowed = rounds.next_allowed()
            name = str(len(rounds.rounds) + 1)
            gain = dataclasses.replace(self.settings, kl_gain=self._asked / allowed)
            with self.shown.stage(f"target KL {self._asked:g}, round {name}"):
                artifact = self._tuned(name, gain)
                tried = Round(allowed, _predicted(artifact), self._measured(artifact))
            rounds = dataclasses.replace(rounds, rounds=(*rounds.rounds, tried))
            self._record(floor, rounds.rounds)
            self.shown.say(told(rounds.rounds))
        best = rounds.best()
        (self._rounds / str(best + 1) / "artifact").rename(self.folder / "artifact")
        shutil.rmtree(self._rounds)

    @property
    def _rounds(self) -> Path:
        return rounds_of(self.folder)

    @property
    def _asked(self) -> float:
        if self.settings.target_kl is None:
            raise UsageError("a search for a KL needs target_kl")
        return self.settings.target_kl

    def _begun(self) -> tuple[float, tuple[Round, ...]]:
        """The floor and the rounds that an earlier run measured, or the floor."""
        note = self._rounds / "rounds.json"
        if note.exists():
            found: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
            return found["floor"], tuple(Round(**tried) for tried in found["rounds"])
        plain = floor_of(self.settings)
        with self.shown.stage(f"what no plan can save: {plain.bits} bits, group {plain.group_size} in every block"):
            floor = self._measured(self._tuned("floor", plain))
        self.shown.say(f"{plain.bits} bits, group {plain.group_size} in every block lose {floor:.5f} nats per token")
        self._record(floor, ())
        return floor, ()

    def _tuned(self, name: str, settings: TuneSettings) -> Path:
        artifact = self._rounds / name / "artifact"
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

    def _record(self, floor: float, rounds: Sequence[Round]) -> None:
        kept = {"floor": floor, "rounds": [dataclasses.asdict(tried) for tried in rounds]}
        self._rounds.mkdir(exist_ok=True)
        replace_file(self._rounds / "rounds.json", (json.dumps(kept, indent=1) + "\n").encode())


def _predicted(artifact: Path) -> float:
    """The sum of the scores of the plan that an artifact was tuned by."""
    plan = Artifact.open(artifact, check_hashes=False).manifest.algorithm["settings"]["mix"]
    return sum(float(row["score"]) for row in plan["rows"])
