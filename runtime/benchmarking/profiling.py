"""What a decoder's operators take: one package, opened with its runtime's own profile, in prefill and in decode.

A profile makes every run slower, so it is taken in runs of its own, after those that are timed:

    the prompt and two tokens               warms up
    the prompt and one token, `PREFILLS` ×  prefill
    the prompt and all tokens               its last ``output_len − 1`` runs are decode

Every prompt is read in the same number of runs, so how many of all runs that are follows.  In this order because
OpenVINO tells means over all runs so far in whole microseconds: what is counted early is exact, and so is a long row of
steps together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from roundexport.errors import UnsupportedError, UsageError
from roundexport.runtime.generation import Decoder
from roundexport.runtime.loading import open_with
from roundexport.runtime.operator_times import OperatorTimes, ProfiledBackend
from roundexport.runtime.types import EngineOptions

from .contestants import Contestant
from .generating import timed_generation

PREFILLS = 3


def refuse_unprofiled(contestants: Sequence[Contestant]) -> None:
    """Raise where a contestant cannot tell what its operators take.

    Raises:
        UsageError: one of them is not a package in an engine of ours; with all names.
    """
    wrong = [contestant.name for contestant in contestants if not contestant.profiles]
    if wrong:
        raise UsageError(
            f"no times of operators from {', '.join(wrong)}: vendors' loops and rivals run the graph themselves; "
            "profile packages in engines ort and openvino, and time the others without"
        )


def profile_package(package: str, engine: str, options: EngineOptions, request: dict[str, Any]) -> dict[str, Any]:
    """A worker's reply to ``profile``: {phase: {"total_ms", "operators"}}.

    Raises:
        UnsupportedError: not a decoder, or its engine tells no times.
    """
    opened = open_with(package, engine, options)
    backend = opened.backend if isinstance(opened, Decoder) else None
    if not isinstance(opened, Decoder) or not isinstance(backend, ProfiledBackend):
        raise UnsupportedError(f"{package}: times of operators are told of decoders in engines ort and openvino")
    for count in (2, *[1] * PREFILLS, request["output_len"]):
        timed_generation(opened, request["prompt"], count, request.get("others", ()))
    prefill, decode = split(backend.operator_times(), request["output_len"] - 1)
    return {"prefill": _mean(prefill, PREFILLS), "decode": _mean(decode, len(decode))}


def split(runs: Sequence[OperatorTimes], steps: int) -> tuple[list[OperatorTimes], list[OperatorTimes]]:
    """Runs that read the prompt `PREFILLS` times, and the ``steps`` decode steps, of all runs in the order above."""
    each, rest = divmod(len(runs) - 1 - steps, PREFILLS + 2)
    assert rest == 0 < each, "a prompt is read in the same number of runs every time"
    return list(runs[each + 1 : each + 1 + PREFILLS * each]), list(runs[-steps:])


def _mean(runs: Sequence[OperatorTimes], over: int) -> dict[str, Any]:
    """Of so many times what the runs are together; longest operators first."""
    sums: dict[str, float] = defaultdict(float)
    for run in runs:
        for name, ms in run.by_operator.items():
            sums[name] += ms / over
    longest = sorted(sums.items(), key=lambda item: -item[1])
    return {"total_ms": sum(run.total_ms for run in runs) / over, "operators": dict(longest)}
