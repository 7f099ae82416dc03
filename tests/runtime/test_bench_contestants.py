"""Who takes part in a benchmark, by which command, and what a start from the disk brings."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runtime_toys as toys

from roundexport.errors import RoundexportError, UnsupportedError, UsageError
from roundexport.runtime import Contestant, bench
from roundexport.runtime.benchmarking import bench as module
from roundexport.runtime.benchmarking.contestants import Rivals, named_contestants
from roundexport.runtime.benchmarking.llama_cpp_worker import BenchTool, opened
from roundexport.runtime.benchmarking.process import forget

OPTIONS = {"device": "CPU", "threads": 1, "precise": False}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.onnx_decoder(tmp_path_factory.mktemp("contestants") / "onnx")


def names(package: Path, engine: str | None, rivals: Rivals | None = None) -> list[str]:
    return [one.name for one in named_contestants([package], engine, rivals or Rivals(), OPTIONS)]


def test_engines_and_rivals_by_name(package: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    rivals = Rivals("model", "file.gguf")
    assert names(package, None) == ["onnx"]
    assert names(package, "auto") == ["onnx · ort", "onnx · onnxruntime-genai"]
    assert names(package, "ort,torch,torch-bfloat16,llama.cpp", rivals) == [
        "onnx", "torch", "torch-bfloat16", "llama.cpp",
    ]  # fmt: skip
    assert names(package, "onnxruntime,openvino") == ["onnx · onnxruntime"]
    torch, llama = named_contestants([], "torch-bfloat16,llama.cpp", rivals, OPTIONS)
    assert torch.command[-4:] == ("roundexport.contestants.torch_worker", "model", "1", "bfloat16")
    assert llama.command[-2:] == ("file.gguf", "1") and llama.files == (Path("file.gguf"),)
    assert named_contestants([package], "ort,torch", Rivals(), OPTIONS)[1].command[-3] == "toy"  # where it is from


@pytest.mark.parametrize(
    ("engine", "message"),
    [("llama.cpp", "--gguf FILE"), ("torch", "--model MODEL"), ("auto", "nothing to time"), (None, "nothing to time")],
)
def test_what_a_rival_lacks_is_said(engine: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        named_contestants([], engine, Rivals(), OPTIONS)


FAKE = """
import sys
from roundexport.runtime.benchmarking.worker import serve
sizes = iter(range(3))
def load():
    open(sys.argv[1], "a").write("start ")
    return {"task": "generate", "vocab_size": 9, "max_context": 64, "info": {"engine": "fake"}, "peak_rss": 2**40}
def generate(prompt, count):
    open(sys.argv[1], "a").write(f"{len(prompt)} ")
    return {"first_ms": 8.0, "tpot_ms": 2.0}
serve(load, generate, lambda batch: {})
"""


def test_a_cold_start_is_a_run_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "read_bandwidth", lambda threads: 20e9)
    log = tmp_path / "log"
    log.write_text("")
    fake = Contestant("fake", (sys.executable, "-c", FAKE, str(log)), (log,))
    [row] = bench(fake, prompt_lens=(4,), output_len=5, rounds=2).rows()
    assert log.read_text().split() == ["start", "4", "start", "4", "4", "4"]
    assert row["cold_load_ms"] >= 0 and row["peak_rss_mib"] == 2**20 and row["first_inference_ms"] == 8
    # a tool that tells a mean and nothing else: no gaps, no percentiles, no hash
    assert row["tpot_ms"] == 2 and row["e2e_ms"] == 16 and row["itl_p50_ms"] is None
    [warm] = bench(fake, prompt_lens=(4,), output_len=5, rounds=1, cold=False).rows()
    assert warm["cold_load_ms"] is None and warm["load_ms"] >= 0


def test_only_files_that_are_there_can_be_dropped(package: Path, tmp_path: Path) -> None:
    assert forget([package]) and not forget([]) and not forget([tmp_path / "none"])
    assert (package / "model.onnx").stat().st_size > 0


LLAMA_BENCH = f"""#!{sys.executable}
import json, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if arguments["-m"].endswith("bad.gguf"):
    sys.exit("no such model")
each = 1e6 if arguments["-n"] == "0" else 5e6
found = {{"build_commit": "abc", "model_size": 77, "type_k": "f16"}}
print(json.dumps([{{**found, "avg_ns": each * (int(arguments["-p"]) + int(arguments["-n"]))}}]))
"""


def test_llama_bench_tells_two_means(tmp_path: Path) -> None:
    tool = tmp_path / "llama-bench"
    tool.write_text(LLAMA_BENCH)
    tool.chmod(0o755)
    model = BenchTool(str(tool), tmp_path / "a.gguf", 2)
    reply = model.generate([1] * 7, 5)
    assert reply["first_ms"] == 7 and reply["tpot_ms"] == 5 and reply["peak_rss"] > 0
    assert model.weight_bytes == 77 and model.info()["version"] == "llama-bench abc"
    with pytest.raises(UnsupportedError, match="one prompt at a time"):
        model.generate([1], 5, [[2]])
    with pytest.raises(RoundexportError, match="ended with code 1: no such model"):
        BenchTool(str(tool), tmp_path / "bad.gguf", 2)
    with pytest.raises(RoundexportError, match=r"no file .*none\.gguf; --gguf"):
        opened(tmp_path / "none.gguf", 1)


def test_the_float_model_writes_what_transformers_writes(models: Callable[[str], Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from roundexport.contestants.torch_worker import FloatModel

    folder, prompts = models("llama"), [[5, 6, 7, 8], [9, 3, 4, 2]]
    model = FloatModel(str(folder), torch.get_num_threads(), "float32")
    about = model.about()
    assert about["task"] == "generate" and about["info"]["precision"]["weights"] == "float32"
    json.dumps(about)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).generate(
        torch.tensor(prompts), max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    assert model.generate(prompts[0], 6, prompts[1:])["tokens"] == theirs[0, 4:].tolist()
    alone = model.generate(prompts[1], 6)
    assert alone["tokens"] == theirs[1, 4:].tolist() and len(alone["step_ms"]) == 5


@pytest.mark.parametrize(
    ("task", "limit", "lengths"),
    [("embed", 512, [128, 512]), ("embed", 256, [128, 256]), ("embed", 64, [64]), ("generate", 300, [128, 236]),
     ("generate", 2048, [128, 512])],
)  # fmt: skip
def test_usual_lengths_are_as_long_as_fits_and_others_as_asked(task: str, limit: int, lengths: list[int]) -> None:
    worker: Any = SimpleNamespace(name="a", task=task, max_context=limit)
    key = "prompt_len" if task == "generate" else "text_len"
    assert [shape[key] for shape in module._shapes([worker], None, 64, [1])] == lengths
    with pytest.raises(UsageError, match=f"the shortest max_context here is {limit}; give shorter"):
        module._shapes([worker], [limit + 1], 64, [1])
