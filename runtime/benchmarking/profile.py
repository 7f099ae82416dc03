"""What operators take, as a benchmark's report holds it, and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PHASES = ("prefill", "decode")
_LEAST = 0.01
"""Share of a phase below which an operator is one of the others."""


@dataclass(frozen=True)
class Profile:
    """One phase of a contestant at a shape.

    Args:
        contestant: its name.
        shape: ``prompt_len``, ``output_len`` and perhaps ``batch_size``.
        phase: ``prefill``, the whole prompt, or ``decode``, one step.
        total_ms: of the graph's runs; with the profile, so more than what is timed.
        operators: milliseconds by the runtime's name of the operator, longest first.
    """

    contestant: str
    shape: dict[str, int]
    phase: str
    total_ms: float
    operators: dict[str, float]


def profile_rows(profiles: Sequence[Profile]) -> list[tuple[str, list[dict[str, Any]]]]:
    """A title and rows per contestant and shape: operators by their time in decode, milliseconds and percent."""
    groups: dict[tuple[str, tuple[tuple[str, int], ...]], dict[str, Profile]] = {}
    for profile in profiles:
        groups.setdefault((profile.contestant, tuple(profile.shape.items())), {})[profile.phase] = profile
    return [
        (f"{name}, {', '.join(f'{part} {size}' for part, size in shape)}: operators", _rows(phases))
        for (name, shape), phases in groups.items()
    ]


def _rows(phases: dict[str, Profile]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(name for phase in reversed(PHASES) for name in phases[phase].operators))
    shown = [
        name for name in names if any(_share(one, one.operators.get(name, 0.0)) >= _LEAST for one in phases.values())
    ]
    rows = {name: {phase: one.operators.get(name, 0.0) for phase, one in phases.items()} for name in shown}
    if len(shown) < len(names):
        rows[f"{len(names) - len(shown)} others"] = {
            phase: sum(ms for name, ms in one.operators.items() if name not in shown) for phase, one in phases.items()
        }
    rows["between operators"] = {
        phase: max(0.0, one.total_ms - sum(one.operators.values())) for phase, one in phases.items()
    }
    rows["all"] = {phase: one.total_ms for phase, one in phases.items()}
    return [
        {
            "operator": name,
            **{
                key: value
                for phase in reversed(PHASES)
                for key, value in (
                    (_HEADINGS[phase], round(ms[phase], 3)),
                    (f"{phase} %", round(100 * _share(phases[phase], ms[phase]), 1)),
                )
            },
        }
        for name, ms in rows.items()
    ]


_HEADINGS = {"decode": "decode ms a step", "prefill": "prefill ms"}


def _share(profile: Profile, ms: float) -> float:
    return ms / profile.total_ms
