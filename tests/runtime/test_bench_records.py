"""Records of a benchmark: what they tell `auto`, and when two of them may stand side by side."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from roundexport.errors import UsageError
from roundexport.runtime.benchmarking.comparing import compare, read_record
from roundexport.runtime.benchmarking.engine_rows import engine_rows
from roundexport.runtime.benchmarking.report import BenchReport, Opened, Run

MACHINE = {
    "cpu": "a CPU", "instruction_sets": ["AVX2"], "physical_cores": 2, "cpu_quota": None, "logical_cores": 2,
    "l3_mib": 1, "load_1min": 0.5, "system": "Linux x86_64", "read_bandwidth_gbps": 20.0,
    "versions": {"numpy": "2.0", "onnxruntime": "1.31.1", "roundexport": "0.1.0"},
}  # fmt: skip
SHAPES = ({"prompt_len": 8, "output_len": 3}, {"prompt_len": 8, "output_len": 3, "batch_size": 4})


def opened(name: str, engine: str, package: str = "onnx") -> Opened:
    info = {"engine": engine, "version": "1", "threads": 2, "precision": {"kv_cache": "f32"}, "package": package}
    return Opened(name, "generate", 5.0, 9.0, 100.0, 120.0, 10**9, info, 0.25, 7.0)


def report(times: list[tuple[Opened, float]], rounds: int = 5, **settings: Any) -> BenchReport:
    """Times of an answer by contestant; of several answers together ten times as long."""
    runs = [
        Run(one.name, number, shape, {"ttft_ms": ms / 2, "tpot_ms": 1.0, "prefill_tps": 1.0, "decode_tps": 1e3 / ms,
                                      "e2e_ms": ms * number * shape.get("batch_size", 1)}, "", (1.0, 1.0))
        for number in range(1, rounds + 1) for shape in SHAPES for one, ms in times
    ]  # fmt: skip
    plain = {"rounds": rounds, "seed": 0, "threads": 2, "device": "CPU", "precise": False}
    return BenchReport(MACHINE, {**plain, **settings}, tuple(one for one, _ in times), tuple(runs))


def pair(ours: float, vendor: float) -> list[tuple[Opened, float]]:
    return [(opened("a · ort", "ort"), ours), (opened("a · genai", "onnxruntime_genai"), vendor)]


def test_a_row_is_the_paired_ratio_of_single_answers() -> None:
    [row] = engine_rows(report(pair(30.0, 20.0)))
    assert (row.target, row.engine, row.batch, row.rounds) == ("onnx", "onnxruntime_genai", 1, 5)
    assert row.ratio == row.low == row.high == 1.5
    assert row.instruction_sets == ("AVX2",) and row.versions["onnxruntime"]
    assert row.measured_on == "onnx (1000 MB), prompts of 8, 3 written, 2 threads"


def test_packages_of_a_target_are_pooled_and_rivals_left_out() -> None:
    second = [(opened("b · ort", "ort", "b"), 10.0), (opened("b · genai", "onnxruntime_genai", "b"), 20.0)]
    [row] = engine_rows(report([*pair(30.0, 20.0), *second, (opened("torch", "torch"), 1.0)]))
    assert row.rounds == 10 and row.low == 0.5 and row.high == 1.5


@pytest.mark.parametrize("settings", [{"rounds": 4}, {"precise": True}, {"device": "GPU"}], ids=str)
def test_what_proves_nothing_gives_no_row(settings: dict[str, Any]) -> None:
    assert engine_rows(report(pair(30.0, 20.0), **settings)) == []


def test_a_busy_machine_gives_no_row() -> None:
    busy = report(pair(30.0, 20.0))
    assert engine_rows(replace(busy, machine={**MACHINE, "load_1min": 1.1})) == []


def record(**changes: Any) -> dict[str, Any]:
    found = copy.deepcopy(json.loads(json.dumps(report(pair(30.0, 20.0)).to_json())))
    for path, value in changes.items():
        *parts, last = path.split("__")
        place = found
        for part in parts:
            place = place[int(part) if part.isdigit() else part]
        place[last] = value
    return found


def test_two_records_of_one_machine_stand_side_by_side() -> None:
    rows = compare(record(), record(machine__load_1min=3.0, machine__versions__roundexport="0.2.0"), "old.json")
    assert len(rows) == 4 and rows[0]["ttft_ms_before"] == 15.0 and rows[0]["decode_tps_ratio"] == 1.0
    json.dumps(rows)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"machine__cpu": "another"}, "cpu was a CPU, is another"),
        ({"machine__instruction_sets": ["AVX2", "AMX-INT8"]}, "instruction_sets was AVX2, is AVX2 AMX-INT8"),
        ({"machine__versions__onnxruntime": "1.32"}, r"versions onnxruntime was 1\.31\.1, is 1\.32"),
        ({"machine__versions__openvino": "2026"}, "versions openvino was None, is 2026"),
        ({"settings__threads": 4}, "threads was 2, is 4"),
        ({"settings__precise": True}, "precise was False, is True"),
        ({"settings__properties": {"A": "u8"}}, "properties A was None, is u8"),
        ({"contestants__0__info__precision": {"kv_cache": "u8"}}, "a · ort: precision kv_cache was f32, is u8"),
        ({"contestants__1__info__version": "2"}, "a · genai: version was 1, is 2"),
    ],
)
def test_a_record_of_another_kind_is_refused_by_what_differs(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=rf"old\.json cannot be compared with this run: {told}\. Run both"):
        compare(record(), record(**changes), "old.json")


def test_what_is_not_a_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(UsageError, match=r"is not a benchmark's JSON document .* no machine"):
        read_record(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_record(tmp_path / "none.json")
    with pytest.raises(UsageError, match="no contestant and shape of this run"):
        compare(record(rows=[]), record(), "old.json")
