"""A profile per operator: what the runtimes tell is split into prompt and steps, and refused where nobody tells it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import runtime_toys as toys
from openvino import ProfilingInfo
from typer.main import get_command
from typer.testing import CliRunner

from roundexport.cli.app import app
from roundexport.errors import RoundexportError, UnsupportedError, UsageError
from roundexport.runtime import Contestant, bench, load, package_contestant
from roundexport.runtime.benchmarking import bench as timing
from roundexport.runtime.benchmarking import profiling
from roundexport.runtime.benchmarking.profile import Profile, profile_rows
from roundexport.runtime.benchmarking.profiling import profile_package, split
from roundexport.runtime.engines._ort_profile import read_profile
from roundexport.runtime.engines._ov_graph import Graph
from roundexport.runtime.loading import open_with
from roundexport.runtime.operator_times import OperatorTimes
from roundexport.runtime.server.models import open_models
from roundexport.runtime.server.settings import ServerSettings
from roundexport.runtime.types import EngineOptions
from roundexport.runtime.writing import load_decoder

PROFILED = EngineOptions(threads=1, profile=True)
ATTENTION = {"ort": "GroupQueryAttention", "ov": "PagedAttentionExtension", "ov-states": "ScaledDotProductAttention"}


@pytest.mark.parametrize("kind", ATTENTION)
def test_every_step_is_told_by_operator(toy: Callable[[str], Path], kind: str) -> None:
    request = {"prompt": list(range(4, 12)), "output_len": 4}
    found = profile_package(str(toy(kind)), kind.partition("-")[0], PROFILED, request)
    for phase in ("prefill", "decode"):
        told = found[phase]
        assert any(ATTENTION[kind] in name for name in told["operators"]), told["operators"]
        assert 0 < sum(told["operators"].values()) <= told["total_ms"] + 0.05  # whole microseconds a node


def test_a_backend_opened_as_usual_tells_nothing(toy: Callable[[str], Path]) -> None:
    for kind in ("ort", "ov"):
        with pytest.raises(UsageError, match="opened with profile"):
            load(toy(kind), threads=1).backend.operator_times()  # type: ignore[union-attr]


def test_an_operator_inside_another_is_not_counted_twice(tmp_path: Path) -> None:
    def node(name: str, begin: int, time: int) -> dict[str, object]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": begin, "dur": time, "args": {"op_name": name}}

    run = {"cat": "Session", "name": "model_run", "dur": 100}
    events = [
        {"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 50},
        {"cat": "Node", "name": "a_fence_before", "ts": 100, "dur": 0, "args": {"op_name": "If"}},
        node("Add", 112, 20), node("If", 110, 50), node("MatMul", 160, 30), {**run, "ts": 100},
        node("MatMul", 300, 40), {**run, "ts": 290},
    ]  # fmt: skip
    (tmp_path / "runs.json").write_text(json.dumps(events))
    assert read_profile(tmp_path / "runs.json") == [
        OperatorTimes(0.1, {"If": 0.05, "MatMul": 0.03}), OperatorTimes(0.1, {"MatMul": 0.04}),
    ]  # fmt: skip


def test_runs_are_told_apart_by_their_order() -> None:
    runs = [OperatorTimes(float(number), {}) for number in range(14)]  # a prompt in two pieces, three steps
    prefill, decode = split(runs, [3, 5, 7, 9, 14])
    assert [run.total_ms for run in prefill] == [3, 4, 5, 6, 7, 8]
    assert [run.total_ms for run in decode] == [11, 12, 13]


@pytest.mark.parametrize("kind", ATTENTION)
def test_rows_answered_together_are_told_apart_too(
    toy: Callable[[str], Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts, or a step of two rows, are one run, or two where an engine takes row after row."""
    lengths = []

    def told(runs: Sequence[OperatorTimes], ends: Sequence[int]) -> tuple[list[OperatorTimes], list[OperatorTimes]]:
        lengths.extend(len(part) for part in split(runs, ends))
        return split(runs, ends)

    monkeypatch.setattr(profiling, "split", told)
    request = {"prompt": list(range(4, 12)), "others": [list(range(5, 13))], "output_len": 5}
    profile_package(str(toy(kind)), kind.partition("-")[0], PROFILED, request)
    assert lengths == {"ort": [6, 4], "ov": [3, 4], "ov-states": [6, 8]}[kind]


def test_means_over_all_runs_become_times_of_each() -> None:
    """OpenVINO tells of a node the mean over all runs so far: 8, then 5, then 4 ms are 8, 2 and 2 ms."""

    def told(ms: int) -> SimpleNamespace:
        node = ProfilingInfo()
        node.status, node.node_name, node.node_type = ProfilingInfo.Status.EXECUTED, "a", "MatMul"
        node.real_time = timedelta(milliseconds=ms)
        return SimpleNamespace(get_profiling_info=lambda: [node])

    compiled = SimpleNamespace(inputs=[])
    graph = Graph(compiled, "CPU", EngineOptions(profile=True), {})  # type: ignore[arg-type]
    for ms in (8, 5, 4):
        graph.record(told(ms), 0.0)  # type: ignore[arg-type]
    assert [run.by_operator["MatMul"] for run in graph.operator_times()] == pytest.approx([8.0, 2.0, 2.0])


def test_rows_are_ordered_by_decode_and_add_up() -> None:
    shape = {"prompt_len": 8, "output_len": 4}
    operators = {"MatMul": 6.0, "Attention": 2.0, "Cast": 0.05, "Shape": 0.05}
    profiles = [
        Profile("a", shape, "prefill", 50.0, {"Attention": 30.0, "MatMul": 10.0}),
        Profile("a", shape, "decode", 10.0, operators),
    ]
    ((title, rows),) = profile_rows(profiles)
    assert title == "a, prompt_len 8, output_len 4: operators"
    assert [tuple(row.values()) for row in rows] == [
        ("MatMul", 6.0, 60.0, 10.0, 20.0), ("Attention", 2.0, 20.0, 30.0, 60.0), ("2 others", 0.1, 1.0, 0.0, 0.0),
        ("between operators", 1.9, 19.0, 10.0, 20.0), ("all", 10.0, 100.0, 50.0, 100.0),
    ]  # fmt: skip


def test_who_cannot_tell_is_refused_before_anything_runs(toy: Callable[[str], Path]) -> None:
    contestants = [package_contestant(toy("ort")), package_contestant(toy("ort"), "loop", engine="onnxruntime-genai"),
                   Contestant("rival", ("no-such-program",))]  # fmt: skip
    with pytest.raises(UsageError, match="no times of operators from loop, rival: vendors' loops and rivals"):
        bench(contestants, profile=True)


def test_a_profile_stands_beside_the_result(toy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "read_bandwidth", lambda threads: 20e9)
    report = bench(toy("ort"), prompt_lens=(8,), output_len=3, rounds=1, threads=1, cold=False, profile=True)
    assert [(one.contestant, one.phase) for one in report.profiles] == [("ort", "prefill"), ("ort", "decode")]
    assert report.to_json()["profiles"][1]["operators"]["GroupQueryAttention"] > 0


def test_an_encoder_is_refused_before_anything_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = toys.onnx_encoder(tmp_path / "encoder")
    monkeypatch.setattr(timing, "read_bandwidth", lambda threads: 20e9)
    monkeypatch.setattr(timing, "_measure", lambda *given: pytest.fail("it was timed first"))
    for cold in (True, False):
        with pytest.raises(UnsupportedError, match=r"\(embed\): times of operators are told of decoders"):
            bench(package, threads=1, cold=cold, profile=True)


def test_a_profile_that_fails_takes_no_times_with_it(
    toy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object) -> list[Profile]:
        raise RoundexportError("contestant 'ort' ended with code -9: no message")

    monkeypatch.setattr(timing, "read_bandwidth", lambda threads: 20e9)
    monkeypatch.setattr(timing, "_profiles", fail)
    report = bench(toy("ort"), prompt_lens=(8,), output_len=3, rounds=1, threads=1, cold=False, profile=True)
    assert len(report.runs) == 1
    assert report.to_json()["notes"] == ("no profile of ort: contestant 'ort' ended with code -9: no message",)


@pytest.mark.parametrize("kind", ["ort", "ov"])
def test_a_prompt_is_read_in_pieces_of_the_size_that_is_asked_for(toy: Callable[[str], Path], kind: str) -> None:
    options = EngineOptions(threads=1, precise=True, profile=True, prefill_chunk=3)
    pieces, whole = (open_with(toy(kind), kind, one) for one in (options, EngineOptions(threads=1, precise=True)))
    logits = []
    for package in (pieces, whole):
        with package.start(rows=1, expected=8) as session:  # type: ignore[union-attr]
            logits.append(session.extend({session.add()[0]: list(range(4, 12))}).copy())
    assert np.abs(logits[0] - logits[1]).max() < 1e-4
    assert len(pieces.backend.operator_times()) == 3  # type: ignore[union-attr]  # 3 + 3 + 2 tokens


def test_properties_reach_the_plugin_and_nonsense_does_not(toy: Callable[[str], Path]) -> None:
    def precision(**given: str) -> dict[str, object]:
        return load(toy("ov"), threads=1, precise=True, properties=given).info()["precision"]  # type: ignore[no-any-return]

    assert precision()["kv_cache"] == "f32"
    assert precision(KV_CACHE_PRECISION="u8")["kv_cache"] == "u8"
    assert precision(DYNAMIC_QUANTIZATION_GROUP_SIZE="32")["dynamic_quantization_group_size"] == 32
    with pytest.raises(UsageError, match="has no property 'KV_CACHE' to set; it has"):
        precision(KV_CACHE="u8")
    with pytest.raises(UsageError, match="KV_CACHE_PRECISION does not take 'eight'"):
        precision(KV_CACHE_PRECISION="eight")
    with pytest.raises(UnsupportedError, match="are OpenVINO's"):
        load(toy("ort"), threads=1, properties={"KV_CACHE_PRECISION": "u8"})


def test_whatever_opens_a_package_hands_properties_on(
    toy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "read_bandwidth", lambda threads: 20e9)
    package, cache = toy("ov"), {"KV_CACHE_PRECISION": "u8"}
    written = load_decoder(package, threads=1, precise=True, properties=cache)
    report = bench(
        package, prompt_lens=(8,), output_len=2, rounds=1, threads=1, cold=False, precise=True, properties=cache
    )
    for info in (written.info(), report.contestants[0].info):
        assert info["precision"]["kv_cache"] == "u8" and info["precision"]["activations"] == "f32"
    assert report.settings["properties"] == cache
    with pytest.raises(UsageError, match="has no property 'KV_CACHE' to set"):
        open_models([str(package)], ServerSettings(port=0), threads=1, properties={"KV_CACHE": "u8"})


@pytest.mark.parametrize(
    "verb",
    [
        ("generate", "--prompt", "a"),
        ("serve", "--port", "0"),
        ("bench", "--no-cold"),
        ("chat",),
        ("classify", "a text"),
        ("transcribe", "a.wav"),
    ],
)
def test_every_verb_that_opens_packages_takes_properties(toy: Callable[[str], Path], verb: tuple[str, ...]) -> None:
    name, *options = verb
    asked = [name, str(toy("ov")), *options, "--threads", "1", "--property", "KV_CACHE=u8"]
    found = CliRunner().invoke(app, asked)
    assert isinstance(found.exception, RoundexportError), found.output
    assert "has no property 'KV_CACHE' to set" in str(found.exception)


def test_no_verb_that_chooses_an_engine_leaves_properties_out() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    options = {name: {flag for option in verb.params for flag in option.opts} for name, verb in commands.items()}
    opening = {name for name, flags in options.items() if "--engine" in flags}
    assert opening >= {"chat", "classify", "generate", "transcribe", "serve", "bench"}
    assert [name for name in sorted(opening) if "--property" not in options[name]] == []


@pytest.mark.parametrize("verb", [("generate", "--prompt", "a"), ("chat",)])
def test_a_draft_has_properties_of_its_own(toy: Callable[[str], Path], verb: tuple[str, ...]) -> None:
    name, *options = verb
    asked = [name, str(toy("ort")), *options, "--threads", "1", "--draft-property", "KV_CACHE=u8"]
    found = CliRunner().invoke(app, [*asked, "--draft", str(toy("ov"))])
    assert isinstance(found.exception, UsageError), found.output
    assert "has no property 'KV_CACHE' to set" in str(found.exception)
    alone = CliRunner().invoke(app, asked)
    assert "--draft-property is for the package that --draft names" in str(alone.exception)
