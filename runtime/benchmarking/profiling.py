"""What a decoder's operators take: one package, opened with its runtime's own profile, in prefill and in decode.

A profile makes every run slower, so it is taken in runs of its own, after those that are timed:

    the prompt and two tokens               warms up
    the prompt and one token, `PREFILLS` ×  prefill
    the prompt and all tokens               what follows the prompt is decode

How many runs a prompt or a step takes is the engine's affair: several where it reads prompts in pieces, or rows one
after the other.  So runs are counted when each request ends.  In this order because
OpenVINO tells means over all runs so far in whole microseconds: what is counted early is exact, and so is a long row of
steps together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from roundexport.errors import UnsupportedError, UsageError
from roundexport.runtime.generation import Decoder
from roundexport.runtime.loading import open_with
from roundexport.runtime.operator_times import OperatorTimes, ProfiledBackend
from roundexport.runtime.types import EngineOptions

from .contestants import Contestant
from .generating import timed_generation

PREFILLS = 3
_WHOSE = "times of operators are told of decoders in engines ort and openvino"


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


def refuse_opened(name: str, loaded: Mapping[str, Any]) -> None:
    """Raise where what a contestant said when it was loaded shows that it has no times of operators.

    Raises:
        UnsupportedError: it is an encoder, or its backend records nothing.
    """
    if not loaded.get("profiles", True):
        raise UnsupportedError(f"{name} ({loaded['task']}): {_WHOSE}; time it without profile")


def profiles(opened: object) -> bool:
    """Whether `profile_package` tells anything of a package opened like this one."""
    return isinstance(opened, Decoder) and isinstance(opened.backend, ProfiledBackend)


def profile_package(package: str, engine: str, options: EngineOptions, request: dict[str, Any]) -> dict[str, Any]:
    """A worker's reply to ``profile``: {phase: {"total_ms", "operators"}}.

    Raises:
        UnsupportedError: not a decoder, or its engine tells no times.
    """
    opened = open_with(package, engine, options)
    backend = opened.backend if isinstance(opened, Decoder) else None
    if not isinstance(opened, Decoder) or not isinstance(backend, ProfiledBackend):
        raise UnsupportedError(f"{package}: {_WHOSE}")
    ends = []
    for count in (2, *[1] * PREFILLS, request["output_len"]):
        timed_generation(opened, request["prompt"], count, request.get("others", ()))
        ends.append(backend.runs())
    prefill, decode = split(backend.operator_times(), ends)
    return {"prefill": _mean(prefill, PREFILLS), "decode": _mean(decode, request["output_len"] - 1)}


def split(runs: Sequence[OperatorTimes], ends: Sequence[int]) -> tuple[list[OperatorTimes], list[OperatorTimes]]:
    """Runs that read the prompt `PREFILLS` times, and those of the decode steps.

    Args:
        runs: all of them.
        ends: how many there were when each request ended, in the order above.
    """
    assert len(runs) == ends[-1], "every run is told and counted"
    prefill = list(runs[ends[0] : ends[PREFILLS]])
    return prefill, list(runs[ends[PREFILLS] + len(prefill) // PREFILLS :])


def _mean(runs: Sequence[OperatorTimes], over: int) -> dict[str, Any]:
    """Of so many times what the runs are together; longest operators first."""
    sums: dict[str, float] = defaultdict(float)
    for run in runs:
        for name, ms in run.by_operator.items():
            sums[name] += ms / over
    longest = sorted(sums.items(), key=lambda item: -item[1])
    return {"total_ms": sum(run.total_ms for run in runs) / over, "operators": dict(longest)}
