"""The benchmark: what is asked of contestants, what is computed from their times, and how failures surface."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import runtime_toys as toys
from rich.console import Console

from roundexport.errors import RoundexportError, UsageError
from roundexport.formats.package import read_package
from roundexport.formats.verification_record import write_record
from roundexport.runtime import Contestant, load, machine
from roundexport.runtime import bench as whole_bench
from roundexport.runtime.benchmarking import bench as timing
from roundexport.runtime.benchmarking import bench_table, worker
from roundexport.runtime.benchmarking.generating import timed_generation
from roundexport.runtime.benchmarking.report import interval, percentile
from roundexport.runtime.benchmarking.worker import decode_bytes

bench = partial(whole_bench, cold=False)  # one start of each

FAKE = """
import json, sys
from roundexport.runtime.benchmarking.worker import serve
print("chatter of a library", flush=True)
FIRST, GAP, LOG = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
def load():
    print("more chatter")
    return {"task": "generate", "vocab_size": 100, "max_context": 64, "weight_bytes": 10**9, "info": {"engine": "fake"}}
def generate(prompt, count):
    open(LOG, "a").write(json.dumps([FIRST, prompt]) + chr(10))
    return {"first_ms": FIRST, "step_ms": [GAP] * (count - 1), "tokens": prompt[:1] * count}
serve(load, generate, lambda batch: {"ms": 1.0, "sha256": ""})
"""
# The same without the package, which takes a third of a second to import: whatever speaks worker.py's lines takes part.
PLAIN = """
import json, sys
FIRST, GAP, LOG = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
KIND = {"task": "generate", "vocab_size": 100, "max_context": 64, "weight_bytes": 10**9, "info": {"engine": "fake"}}
for asked in map(json.loads, sys.stdin):
    if asked["do"] == "quit":
        break
    reply = {"load_ms": 0.0, **KIND}
    if asked["do"] == "generate":
        prompt, count = asked["prompt"], asked["output_len"]
        open(LOG, "a").write(json.dumps([FIRST, prompt]) + chr(10))
        reply = {"first_ms": FIRST, "step_ms": [GAP] * (count - 1), "tokens": prompt[:1] * count}
    print(json.dumps(reply), flush=True)
"""


def fake(name: str, first_ms: float, gap_ms: float, log: Path, code: str = PLAIN) -> Contestant:
    return Contestant(name, (sys.executable, "-c", code, str(first_ms), str(gap_ms), str(log)))


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "read_bandwidth", lambda threads: 20e9)


def test_figures_follow_from_the_times(tmp_path: Path) -> None:
    log = tmp_path / "log"
    contestants = [fake("slow", 20.0, 100.0, log, FAKE), fake("fast", 10.0, 50.0, log, FAKE)]
    report = bench(contestants, prompt_lens=(8, 16), output_len=5, rounds=3, threads=1)
    rows = report.rows()
    assert [(row["contestant"], row["prompt_len"]) for row in rows] == [
        ("slow", 8), ("fast", 8), ("slow", 16), ("fast", 16),
    ]  # fmt: skip
    fast = rows[3]
    assert fast["n"] == 3 and fast["ttft_ms"] == 10 and fast["tpot_ms"] == 50 and fast["e2e_ms"] == 210
    assert fast["prefill_tps"] == pytest.approx(1600) and fast["decode_tps"] == pytest.approx(20)
    assert fast["itl_p50_ms"] == fast["itl_p90_ms"] == 50 and fast["itl_p99_ms"] is None  # twelve gaps
    assert fast["decode_tps_ratio_min"] is None  # three rounds
    assert fast["decode_tps_ratio"] == pytest.approx(2) and fast["prefill_tps_ratio"] == pytest.approx(2)
    assert fast["mbu"] == pytest.approx(1e9 * 20 / 20e9)
    assert rows[2]["decode_tps_ratio"] == 1
    assert fast["peak_rss_mib"] > 5 and fast["load_ms"] >= 0 and fast["first_inference_ms"] == 10


def test_energy_is_told_per_token_or_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Meter:
        missing: str | None = None

        def __init__(self) -> None:
            self.read = 0.0

        def joules(self) -> float | None:
            self.read += 10.0
            return None if self.missing else self.read

    monkeypatch.setattr(timing, "EnergyMeter", Meter)
    told, told_why = [], "no counter here"
    for missing in (None, told_why):
        monkeypatch.setattr(Meter, "missing", missing)
        report = bench(fake("a", 1.0, 1.0, tmp_path / "log"), prompt_lens=(4,), output_len=5, rounds=1)
        out = io.StringIO()
        Console(file=out, width=250).print(bench_table.tables(report)[0])
        told.append((report.rows()[0]["joules_per_token"], report.machine["energy"], told_why in out.getvalue()))
    assert told == [(2.0, "RAPL, all sockets", False), (None, told_why, True)]


def test_contestants_take_turns_with_the_same_new_prompts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    report = bench([fake("a", 1.0, 1.0, log), fake("b", 2.0, 1.0, log)], prompt_lens=(4, 6), output_len=2, rounds=2)
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    warm_up, timed = asked[:4], asked[4:]
    assert [(who, len(prompt)) for who, prompt in warm_up] == [(1, 4), (1, 6), (2, 4), (2, 6)]
    assert [(who, len(prompt)) for who, prompt in timed] == [(1, 4), (2, 4), (1, 6), (2, 6)] * 2
    assert all(a[1] == b[1] for a, b in zip(timed[::2], timed[1::2], strict=True))
    assert len({tuple(prompt) for _, prompt in asked}) == 6  # two warm-ups, two shapes in two rounds
    assert [run.output_sha256 for run in report.runs[::2]] == [run.output_sha256 for run in report.runs[1::2]]


def test_the_seed_fixes_the_prompts(tmp_path: Path) -> None:
    logs = [tmp_path / str(n) for n in range(3)]
    for log, seed in zip(logs, (1, 1, 2), strict=True):
        bench(fake("a", 1.0, 1.0, log), prompt_lens=(4,), output_len=2, rounds=1, seed=seed)
    assert logs[0].read_text() == logs[1].read_text() != logs[2].read_text()


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("bench")
    return [toys.onnx_decoder(root / "onnx"), toys.ov_decoder(root / "openvino")]


def test_packages_are_timed_in_processes_of_their_own(packages: list[Path]) -> None:
    told: list[str] = []
    report = bench(
        packages, prompt_lens=(16,), output_len=8, rounds=2, threads=1, precise=True, on_progress=told.append
    )
    assert [entry.info["engine"] for entry in report.contestants] == ["ort", "ov"]
    for row in report.rows():
        assert 0 < row["tpot_ms"] < 1000 and 0 < row["ttft_ms"] < 5000 and row["peak_rss_mib"] > 30
        assert row["mbu"] is None  # a toy's weights stay in the cache
    assert told[-1] == "round 2 of 2"
    prompt = np.random.default_rng([0, 1, 16, 8]).integers(0, toys.VOCAB, 16).tolist()
    here = timed_generation(load(packages[0], threads=1, precise=True), prompt, 8)  # type: ignore[arg-type]
    digest = hashlib.sha256(np.array(here["tokens"], np.int64).tobytes()).hexdigest()
    assert digest == report.runs[0].output_sha256
    assert len(here["tokens"]) == 8 and len(here["step_ms"]) == 7


def test_every_package_takes_part_with_each_engine_that_opens_it(packages: list[Path]) -> None:
    report = bench(packages, engine="auto,ov", prompt_lens=(4,), output_len=2, rounds=1, threads=1)
    assert [entry.name for entry in report.contestants] == ["onnx · auto", "openvino · auto", "openvino · ov"]
    assert [entry.info["engine"] for entry in report.contestants] == ["ort", "ov", "ov"]
    with pytest.raises(UsageError, match="onnx: none of the engines ov opens this package"):
        bench(packages, engine="ov", prompt_lens=(4,), output_len=2, rounds=1)


def test_prompts_answered_together_count_together(packages: list[Path]) -> None:
    report = bench(packages, prompt_lens=(4,), batch_sizes=(1, 3), output_len=4, rounds=1, threads=1)
    alone, together = (report.rows()[at] for at in (0, 2))
    assert "batch_size" not in alone or alone["batch_size"] is None
    assert together["batch_size"] == 3
    assert together["decode_tps"] == pytest.approx(3e3 / together["tpot_ms"])
    assert together["prefill_tps"] == pytest.approx(3 * 4e3 / together["ttft_ms"])


def test_accuracy_stands_beside_speed(tmp_path: Path) -> None:
    folder = toys.onnx_decoder(tmp_path / "onnx")
    quality = {"kl": {"mean": 0.25, "standard_error": 0.01}, "windows": 16, "tokens": 8192}
    write_record(folder, {"quality": quality, "text": "a/novel.txt", "text_sha256": "0123456789"})
    (row,) = bench(folder, prompt_lens=(4,), output_len=2, rounds=1).rows()
    assert row["kl"] == 0.25 and row["kl_over"] == "novel.txt 01234567, 16 × 512 tokens"


@pytest.mark.parametrize("record", [{}, {"quality": None}, {"quality": {"kl": 3}}, {"quality": {"kl": {}}}])
def test_a_record_without_a_kl_tells_none(record: dict[str, object], tmp_path: Path) -> None:
    folder = toys.onnx_decoder(tmp_path / "onnx")
    write_record(folder, record)
    assert worker._kl(folder) == {"kl": None, "kl_over": None}


def test_kls_over_different_texts_are_told_apart() -> None:
    rows = [{"contestant": name, "kl_over": "x, 2 × 16"} for name in "ab"] + [{"contestant": "c"}]
    assert bench_table.kl_over(rows) == "KL over x, 2 × 16" and bench_table.kl_over(rows[2:]) == ""
    rows[1]["kl_over"] = "y, 16 × 512"
    assert (
        bench_table.kl_over(rows)
        == "KLs are over different texts and cannot be compared (a: x, 2 × 16; b: y, 16 × 512)"
    )


@pytest.mark.parametrize(("count", "q", "told"), [(2, 50, True), (1, 50, False), (10, 90, True), (99, 99, False)])
def test_a_percentile_needs_a_value_beyond_it(count: int, q: int, told: bool) -> None:
    assert (percentile([1.0] * count, q) is not None) is told


def test_the_interval_of_a_ratio_holds_its_median() -> None:
    ratios = [1.0, 1.1, 1.2, 1.3, 5.0]
    low, high = interval(ratios)
    assert low is not None and high is not None and 1.0 <= low < 1.2 < high <= 5.0
    assert interval([2.0] * 5) == (2.0, 2.0) and interval(ratios[:4]) == (None, None)


def test_every_record_says_where_it_comes_from(packages: list[Path]) -> None:
    report = bench(packages, prompt_lens=(4,), output_len=2, rounds=2, threads=1)
    for line in report.to_jsonl().splitlines():
        record = json.loads(line)
        assert (
            record["machine"]["cpu"] and record["machine"]["versions"]["numpy"] and record["settings"]["threads"] == 1
        )
        assert record["contestant"]["info"]["precision"] and len(record["output_sha256"]) == 64
    lines = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert len(lines) == 2 and lines[1]["engine"] == "ov" and json.loads(lines[1]["precision"])["kv_cache"]
    document = json.loads(json.dumps(report.to_json()))
    assert len(document["runs"]) == 4 and len(document["rows"]) == 2


def test_the_tables_are_no_wider_than_a_terminal_and_drop_nothing(tmp_path: Path) -> None:
    names = ("a-package-of-some-length · onnxruntime-genai", "other")
    contestants = [fake(name, 1.0, 1.0, tmp_path / "log") for name in names]
    report = bench(contestants, prompt_lens=(4,), output_len=5, rounds=5)
    out = io.StringIO()
    for table in bench_table.tables(report):
        Console(file=out, width=120).print(table)
    told = out.getvalue()
    assert all(
        word in told for word in ("a-package-of-some-length", "onnxruntime-genai", "other", "decode tps", "peak")
    )
    assert "…" not in told and "prompt len 4" in told and "cold load" not in told  # nothing cold was measured
    row = report.rows()[1]
    assert f"{row['decode_tps_ratio']:.4g}" in told and f"{row['peak_rss_mib']:.4g}" in told
    lines = bench_table.markdown(report).splitlines()
    assert lines[0].startswith("| contestant | ttft ms |") and len(lines) == 6
    assert [line.count("|") for line in lines[:4]] == [lines[0].count("|")] * 4


def test_encoders_give_latency_and_texts_per_second(tmp_path: Path) -> None:
    folders = [toys.onnx_encoder(tmp_path / "onnx"), toys.ov_encoder(tmp_path / "openvino")]
    report = bench(folders, prompt_lens=(8,), batch_sizes=(1, 4), rounds=2, threads=1)
    rows = report.rows()
    assert [(r["contestant"], r["batch_size"]) for r in rows] == [
        ("onnx", 1),
        ("openvino", 1),
        ("onnx", 4),
        ("openvino", 4),
    ]
    assert all(r["texts_per_s"] > 0 and r["latency_ms"] > 0 for r in rows)


def test_packages_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [toys.onnx_encoder(tmp_path / where / "onnx") for where in ("a", "b")]
    report = bench(folders, prompt_lens=(4,), batch_sizes=(1,), rounds=1)
    assert [entry.name for entry in report.contestants] == [str(folder) for folder in folders]


def test_what_cannot_be_timed_is_refused(tmp_path: Path, packages: list[Path]) -> None:
    log = tmp_path / "log"
    with pytest.raises(UsageError, match="nothing to time"):
        bench([])
    with pytest.raises(UsageError, match=r"70 tokens were asked for.*is 64"):
        bench(fake("a", 1.0, 1.0, log), prompt_lens=(60,), output_len=10)
    with pytest.raises(UsageError, match="different names"):
        bench([fake("a", 1.0, 1.0, log)] * 2)
    with pytest.raises(UsageError, match="rounds"):
        bench(packages, rounds=0)
    with pytest.raises(UsageError, match="decoders and encoders"):
        bench([packages[0], toys.onnx_encoder(tmp_path / "encoder")])


def test_a_contestants_failure_is_told_with_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "no_package").mkdir()
    with pytest.raises(RoundexportError, match=r"contestant 'no_package'.*roundexport\.json"):
        bench(tmp_path / "no_package")
    dying = fake("dying", 1.0, 1.0, tmp_path, "import sys; sys.exit('out of luck')")
    with pytest.raises(RoundexportError, match=r"'dying' ended with code 1: out of luck"):
        bench(dying)
    short = FAKE.replace("prompt[:1] * count", "[1]")
    with pytest.raises(RoundexportError, match="wrote 1 tokens, 4 were asked for"):
        bench(fake("short", 1.0, 1.0, tmp_path / "log", short), prompt_lens=(4,), output_len=4)


@pytest.mark.parametrize(
    ("layers", "kept_float", "left_out"),
    [
        ({}, (), 0),  # no table is named
        ({"model.embed_tokens": 8}, (), 0),  # tied: the output layer reads the table
        ({"model.embed_tokens": 8, "lm_head": 4}, (), 320 * 32 * (1 + 2 / 32)),
        ({"lm_head": 4}, (("model.embed_tokens", "not asked for"),), 320 * 32 * 4),
    ],
)
def test_bytes_of_a_decode_step(tmp_path: Path, layers: dict[str, int], kept_float: object, left_out: float) -> None:
    entry = {"group_size": 32, "symmetric": True, "stored": "x"}
    folder = toys.onnx_decoder(
        tmp_path / "p", layers={name: {"bits": bits, **entry} for name, bits in layers.items()}, kept_float=kept_float
    )
    size = (folder / "model.onnx").stat().st_size
    assert decode_bytes(read_package(folder)) == size - left_out


def test_machine_says_what_decides_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"flags": "fpu avx2 avx512f avx512_vnni amx_int8", "model name": "Some CPU"}
    monkeypatch.setattr(machine, "_cpuinfo", lambda key: flags.get(key, ""))
    info = machine.machine_info()
    assert info["instruction_sets"] == ["AVX2", "AVX-512", "AVX-512-VNNI", "AMX-INT8"] and info["cpu"] == "Some CPU"
    assert info["physical_cores"] >= 1 and info["versions"]["numpy"] == np.__version__


def test_bandwidth_is_plausible() -> None:
    # Slower than any memory of this century at the low end, faster than any processor's caches at the high end.
    assert 5e8 < machine.read_bandwidth(1, mib_per_thread=64, seconds=0.2) < 1e13


def test_devices_include_the_processor() -> None:
    devices = machine.describe_devices()
    assert "CPU" in devices and "cores" in devices["CPU"]
