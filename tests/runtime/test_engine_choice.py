"""What `auto` takes: by rows of a table that speak for this machine, and never at the price of a feature."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import runtime_toys as toys

from roundexport import plugins
from roundexport.errors import ArtifactError
from roundexport.runtime import GenerationSettings, bench, engine_table, load
from roundexport.runtime.benchmarking import bench as timing
from roundexport.runtime.benchmarking.comparing import compare
from roundexport.runtime.engine_table import Measured, Table, choose, keep, read_table, user_table, versions_of
from roundexport.runtime.machine import instruction_sets, machine_info
from roundexport.runtime.settings import Grammar

ENGINES = {name: plugins.load("engines", name) for name in ("ort", "onnxruntime_genai")}
PLAIN = GenerationSettings(max_new_tokens=8, stop=("x",))


@pytest.fixture(autouse=True)
def _tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's cache of the test's own, and nothing shipped."""
    monkeypatch.setenv("ROUNDEXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engine_table, "SHIPPED", tmp_path / "shipped.json")


def row(**changes: object) -> Measured:
    versions = versions_of(*ENGINES.values())
    plain = Measured(
        "onnx", "generate", 1, "onnxruntime_genai", 1.2, 1.1, 1.3, 5, "a toy", instruction_sets(), versions
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def chosen(request: GenerationSettings | None = PLAIN, task: str = "generate") -> str:
    choice = choose("onnx", task, ENGINES, request)  # type: ignore[arg-type]
    assert choice.why and choice.engine in str(choice)
    return choice.engine


pytest.importorskip("onnxruntime_genai")


@pytest.mark.parametrize(
    ("changes", "engine"),
    [
        ({}, "onnxruntime_genai"),
        ({"low": 1.0}, "ort"),  # perhaps not faster
        ({"ratio": 0.8, "low": 0.7, "high": 0.9}, "ort"),
        ({"instruction_sets": ("AVX2",)}, "ort"),
        ({"versions": {"onnxruntime": "1.0", "onnxruntime-genai": "0.1"}}, "ort"),
        ({"batch": 8}, "ort"),
        ({"target": "openvino"}, "ort"),
    ],
    ids=str,
)
def test_a_row_counts_where_it_speaks_for_this_machine(changes: dict[str, object], engine: str) -> None:
    keep([row(**changes)])
    assert chosen() == engine


@pytest.mark.parametrize(
    "request_",
    [
        None,
        GenerationSettings(temperature=0.5),
        GenerationSettings(repetition_penalty=1.1),
        GenerationSettings(logit_bias={1: 1.0}),
        GenerationSettings(logprobs=0),
        GenerationSettings(ignore_eos=True),
        GenerationSettings(grammar=Grammar("regex", "a+")),
    ],
    ids=str,
)
def test_what_loops_do_otherwise_goes_to_the_sessions(request_: GenerationSettings | None) -> None:
    keep([row()])
    assert chosen(request_) == "ort" and chosen(PLAIN, "embed") == "ort" and chosen() == "onnxruntime_genai"


def test_the_users_rows_come_before_the_shipped_ones(tmp_path: Path) -> None:
    assert "was not measured" in choose("onnx", "generate", ENGINES, PLAIN).why
    keep([row()], tmp_path / "shipped.json")
    assert chosen() == "onnxruntime_genai"
    keep([row(low=0.9)])
    assert chosen() == "ort"


def test_rows_replace_their_predecessors_and_leave_others() -> None:
    keep([row(), row(target="openvino")])
    keep([row(ratio=3.0)])
    assert [(r.target, r.ratio) for r in read_table(user_table()).rows] == [("onnx", 3.0), ("openvino", 1.2)]


@pytest.mark.parametrize("text", ["", "{}", '{"format": "roundexport-engines/2", "rows": []}', "[1", '{"rows": 3}'])
def test_a_file_that_is_not_a_table_is_as_if_it_were_not_there(text: str) -> None:
    user_table().parent.mkdir(parents=True)
    user_table().write_text(text)
    assert read_table(user_table()) == Table() and chosen() == "ort"
    keep([row()])
    assert chosen() == "onnxruntime_genai"


def test_load_opens_what_was_chosen(packages: Callable[[str, str], tuple[Path, Path]]) -> None:
    folder = packages("sample", "onnx")[1]
    keep([row()])
    texts = []
    for request, engine in ((PLAIN, "onnxruntime_genai"), (None, "ort")):
        opened = load(folder, threads=1, request=request)
        assert opened.info()["engine"] == engine and opened.choice is not None and opened.choice.engine == engine
        texts.append([step.tokens for step in opened.generate(["The sea was"], PLAIN)])  # type: ignore[union-attr]
    assert texts[0] == texts[1]
    assert load(folder, threads=1, precise=True, request=PLAIN).info()["engine"] == "ort"


def test_a_loop_that_refuses_the_package_is_not_taken(tmp_path: Path) -> None:
    keep([row()])
    opened = load(toys.onnx_decoder(tmp_path / "package"), threads=1, request=PLAIN)  # without genai_config.json
    assert opened.choice is not None and opened.choice.engine == "ort" and "genai_config.json" in opened.choice.why
    assert opened.choice.threads.split()[1].startswith("thread") and opened.choice.threads in str(opened.choice)


@pytest.mark.parametrize(
    "decoder",
    [
        {"session_options": {"custom_ops_library": "evil.so"}},
        {"session_options": {"provider_options": [{"QNN": {"backend_path": "evil.so"}}]}},
        {"filename": "other.onnx"},
    ],
    ids=str,
)
def test_a_configuration_that_brings_code_is_refused(tmp_path: Path, decoder: dict[str, object]) -> None:
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}}))
    with pytest.raises(ArtifactError, match=r"genai_config\.json: .*(evil|is refused|other\.onnx)"):
        load(toys.onnx_decoder(tmp_path), engine="onnxruntime-genai", threads=1)


def test_a_benchmark_of_all_engines_writes_what_load_reads(
    packages: Callable[[str, str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "read_bandwidth", lambda threads: 20e9)
    monkeypatch.setattr(timing, "machine_info", lambda: {**machine_info(), "load_1min": 0.0})
    folder, told = packages("sample", "onnx")[1], list[str]()
    report = bench(
        folder, engine="auto", prompt_lens=(4,), output_len=3, rounds=5, threads=1, cold=False, on_progress=told.append
    )
    [kept] = read_table(user_table()).rows
    assert kept.engine == "onnxruntime_genai" and kept.rounds == 5 and kept.low <= kept.ratio <= kept.high
    assert str(user_table()) in told[-1] and str(kept) in told[-2]
    opened = load(folder, threads=1, request=PLAIN)
    assert opened.info()["engine"] == ("onnxruntime_genai" if kept.low > 1 else "ort")
    assert [row["ttft_ms_ratio"] for row in compare(report.to_json(), report.to_json(), "itself")] == [1, 1]
