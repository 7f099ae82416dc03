"""What a graph's operators take, as a backend tells it that was opened with `EngineOptions.profile`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class OperatorTimes:
    """One run of a graph.

    Args:
        total_ms: from the call to its end.
        by_operator: milliseconds by the runtime's name of the operator; of one inside another only the outer one.
    """

    total_ms: float
    by_operator: Mapping[str, float]


@runtime_checkable
class ProfiledBackend(Protocol):
    """A backend whose runtime tells times of operators."""

    def runs(self) -> int:
        """Runs since it was opened, which tells those of one request from those of the next."""

    def operator_times(self) -> list[OperatorTimes]:
        """Of every run since it was opened, in order; nothing is recorded afterwards.

        Raises:
            UsageError: it was opened without `EngineOptions.profile`.
        """
