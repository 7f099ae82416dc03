"""A row of the table of families: what one came to on each target.

difference   to transformers, in standard deviations of its outputs; right below RIGHT, or below twice of what
             transformers' float32 is itself away from its float64: two such computations may differ by that much
refused      said before any weight was read, with the reason
failed       anything else: outputs that differ, an error of somebody's, a process that died
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

RIGHT, TIMES = 1e-4, 2.0
State = Literal["right", "refused", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What a family came to on one target; one of the first three is given.

    Args:
        difference: the largest to transformers.
        refused: why it is refused.
        failed: what went wrong.
        where: in which run the difference was found.
        own: of transformers' model in float32 and in float64; None: not computed.
        attention: attention layers that the runtime runs as one operator; None: not counted.
        layers: attention layers.
    """

    difference: float | None = None
    refused: str | None = None
    failed: str | None = None
    where: str = ""
    own: float | None = None
    attention: int | None = None
    layers: int = 0

    @property
    def state(self) -> State:
        """What the table counts it as."""
        if self.refused is not None:
            return "refused"
        return "right" if self.difference is not None and self.difference < self.allowed else "failed"

    @property
    def allowed(self) -> float:
        """The difference below which it is right."""
        return max(RIGHT, TIMES * (self.own or 0.0))

    @property
    def failure(self) -> str:
        """What went wrong, with its figure where it has one."""
        if self.difference is None:
            return self.reason
        return f"off by {self.difference:.1e} in {self.where}, where it may be by {self.allowed:.1e}"

    @property
    def noisy(self) -> bool:
        """Whether it is right by transformers' own error alone."""
        return self.state == "right" and self.difference is not None and self.difference >= RIGHT

    def lost_since(self, before: Outcome) -> str:
        """What an earlier outcome had and this one lacks: being right, or attention in one operator; or nothing."""
        if self.state == "failed" or (before.state == "right" and self.state != "right"):
            return self.reason
        if before.state == "right" and (self.attention or 0) < (before.attention or 0):
            return f"{self.fused or 'none'} of its attention layers run as one operator, where {before.fused} did"
        return ""

    @property
    def in_words(self) -> str:
        """The figure, or what happened instead, short."""
        if self.difference is not None:
            return f"{self.difference:.0e}"
        return "refused" if self.refused is not None else "failed"

    @property
    def fused(self) -> str:
        """How many of its attention layers are one operator."""
        return "" if self.attention is None else f"{self.attention}/{self.layers}"

    @property
    def reason(self) -> str:
        """Why there is not a right package; empty where there is."""
        if self.state == "right":
            return ""
        return self.refused or self.failed or f"the largest difference is in: {self.where}"


@dataclass(frozen=True)
class Row:
    """A family and what it came to.

    Args:
        family: its name in configurations.json.
        model: transformers' class.
        task: what it is for; empty where that was not found.
        outcomes: by target.
        seconds: what trying it took.
        machine: processor and its instruction sets; empty: not kept.
        commit: of this project's tree, with a plus where it was changed; empty: not kept, or not a tree.
    """

    family: str
    model: str
    task: str
    outcomes: Mapping[str, Outcome]
    seconds: float = 0.0
    machine: str = ""
    commit: str = ""

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object, without what is not given."""
        outcomes = {target: _given(outcome) for target, outcome in self.outcomes.items()}
        return {
            "family": self.family,
            "model": self.model,
            "task": self.task,
            "outcomes": outcomes,
            "seconds": self.seconds,
            **({"machine": self.machine, "commit": self.commit} if self.machine else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Row:
        """What :meth:`to_json` gave."""
        outcomes = {target: Outcome(**outcome) for target, outcome in value["outcomes"].items()}
        made = value.get("machine", ""), value.get("commit", "")
        return cls(value["family"], value["model"], value["task"], outcomes, value["seconds"], *made)

    @property
    def own(self) -> float | None:
        """The largest that transformers' float32 is away from its float64."""
        return max((outcome.own for outcome in self.outcomes.values() if outcome.own is not None), default=None)

    @property
    def reason(self) -> str:
        """Why a target has no right package, each reason once."""
        told: dict[str, list[str]] = {}
        for target, outcome in self.outcomes.items():
            if outcome.reason:
                told.setdefault(outcome.reason, []).append(target)
        everywhere = len(told) == 1 and len(next(iter(told.values()))) == len(self.outcomes)
        return next(iter(told)) if everywhere else "; ".join(f"{' and '.join(at)}: {why}" for why, at in told.items())


def _given(outcome: Outcome) -> dict[str, Any]:
    empty = Outcome()
    return {key: value for key, value in asdict(outcome).items() if value != getattr(empty, key)}
