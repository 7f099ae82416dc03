"""ONNX Runtime's own profile: a JSON file of events, read into the times of each run's operators.

    cat Session, name model_run             one run: begins at ts, takes dur, microseconds
    cat Node, name …_kernel_time            one operator of it: args.op_name; those of a subgraph lie inside their If

Source: https://onnxruntime.ai/docs/performance/tune-performance/profiling-tools.html.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from roundexport.runtime.operator_times import OperatorTimes


class CountingSession:
    """A session that counts its runs, which its profile tells only at the end.

    Args:
        session: the one that is profiled.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self.runs = 0

    def run(self, *given: Any) -> Any:
        self.runs += 1
        return self._session.run(*given)

    def run_with_iobinding(self, *given: Any) -> None:
        self.runs += 1
        self._session.run_with_iobinding(*given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def read_profile(path: Path) -> list[OperatorTimes]:
    """Times of the operators of each run that a profile holds, in order."""
    events: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))
    runs = [one for one in events if one.get("cat") == "Session" and one["name"] == "model_run"]
    nodes = [one for one in events if one.get("cat") == "Node" and one["name"].endswith("_kernel_time")]
    left = iter(_outermost(nodes))
    found, node = [], next(left, None)
    for run in sorted(runs, key=lambda one: int(one["ts"])):
        times: dict[str, float] = defaultdict(float)
        while node is not None and node["ts"] < run["ts"] + run["dur"]:
            if node["ts"] >= run["ts"]:
                times[node["args"]["op_name"]] += node["dur"] / 1e3
            node = next(left, None)
        found.append(OperatorTimes(run["dur"] / 1e3, dict(times)))
    return found


def _outermost(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Nodes that lie in no other one, by their beginning."""
    kept: list[dict[str, Any]] = []
    end = -1
    for node in sorted(nodes, key=lambda one: (one["ts"], -one["dur"])):
        if node["ts"] >= end:
            kept.append(node)
            end = node["ts"] + node["dur"]
    return kept
