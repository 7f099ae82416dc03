"""Opening packages: the right engine, only that one, and refusals that say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runtime_toys as toys

from roundexport.errors import ArtifactError, UnsupportedError, UsageError
from roundexport.runtime import Decoder, Encoder, load


@pytest.fixture(scope="module")
def onnx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.onnx_decoder(tmp_path_factory.mktemp("loading") / "onnx")


@pytest.fixture(scope="module")
def ov_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.ov_decoder(tmp_path_factory.mktemp("loading") / "openvino")


def test_auto_takes_the_engine_of_the_target(onnx_folder: Path, ov_folder: Path) -> None:
    for folder, engine in ((onnx_folder, "ort"), (ov_folder, "ov")):
        info = load(folder, threads=2).info()
        assert (info["engine"], info["device"], info["threads"]) == (engine, "CPU", 2)
        json.dumps(info)


def test_task_decides_what_is_returned(onnx_folder: Path, tmp_path: Path) -> None:
    assert isinstance(load(onnx_folder), Decoder)
    assert isinstance(load(toys.onnx_encoder(tmp_path / "encoder")), Encoder)


def test_an_engine_refuses_another_target(onnx_folder: Path, ov_folder: Path) -> None:
    with pytest.raises(UsageError, match="use engine 'ort'"):
        load(onnx_folder, engine="ov")
    with pytest.raises(UsageError, match="use engine 'ov'"):
        load(ov_folder, engine="ort")


def test_an_unknown_engine_gets_the_list(onnx_folder: Path) -> None:
    with pytest.raises(UsageError, match="known: onnxruntime_genai, openvino_genai, openvino_genai_batching, ort, ov"):
        load(onnx_folder, engine="tensorrt")


def test_absent_devices_are_named(onnx_folder: Path, ov_folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="CPU only"):
        load(onnx_folder, device="GPU")
    with pytest.raises(UnsupportedError, match=r"no device 'TPU'.*CPU"):
        load(ov_folder, device="TPU")


def test_no_threads_are_refused(onnx_folder: Path) -> None:
    with pytest.raises(UsageError, match="threads"):
        load(onnx_folder, threads=0)


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    folder = toys.onnx_decoder(tmp_path / "package")
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        load(folder)


@pytest.mark.parametrize("build", [toys.onnx_decoder, toys.ov_decoder])
def test_a_graph_that_the_runtime_refuses_is_named(tmp_path: Path, build: object) -> None:
    folder = build(tmp_path / "package")  # type: ignore[operator]
    manifest = json.loads((folder / "roundexport.json").read_text())
    model = folder / manifest["model_file"]
    model.write_bytes(b"x" * model.stat().st_size)
    with pytest.raises(ArtifactError, match="refuses the graph"):
        load(folder, check_hashes=False)


@pytest.mark.parametrize(("bits", "block"), [(2, 32), (4, 16), (4, 32), (8, 32)])
def test_precise_computes_int8_activations_in_float32(tmp_path: Path, bits: int, block: int) -> None:
    folder = toys.onnx_decoder(tmp_path / "package", head_bits=bits, head_block=block)
    ids = np.array([[5, 6, 7, 8]])
    shipped, precise = (load(folder, precise=p).logits(ids) for p in (False, True))  # type: ignore[union-attr]
    exact = load(toys.onnx_decoder(tmp_path / "exact", head_bits=bits, head_block=block, accuracy_level=0))
    wanted = exact.logits(ids)  # type: ignore[union-attr]
    largest = np.abs(wanted).max()
    # int8 activations: half a step of 1/127 of the largest, over 32 products; float32: rounding of 32 products.
    assert 1e-4 < np.abs(shipped - wanted).max() / largest < 5e-2
    assert np.abs(precise - wanted).max() / largest < 1e-5
    assert load(folder, precise=True).info()["precision"]["matmul"] == "float32"


def test_openvino_says_what_precisions_are_in_effect(ov_folder: Path) -> None:
    precise, shipped = load(ov_folder, precise=True).info(), load(ov_folder).info()
    assert precise["precision"] == {"activations": "f32", "kv_cache": "f32", "dynamic_quantization_group_size": 0}
    assert shipped["precision"]["kv_cache"] != "f32"


@pytest.mark.parametrize(("absent", "present"), [("openvino", "onnxruntime"), ("onnxruntime", "openvino")])
def test_one_engine_works_without_the_other(onnx_folder: Path, ov_folder: Path, absent: str, present: str) -> None:
    folders = {"onnxruntime": onnx_folder, "openvino": ov_folder}
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ({absent!r}, "torch", "transformers", "onnx"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == {absent!r} else found(name, package)
from roundexport.errors import UnsupportedError
from roundexport.runtime import load
print(len(load({str(folders[present])!r}).greedy([[5, 6]], 3)[0]))
try:
    load({str(folders[absent])!r})
except UnsupportedError as error:
    print(error)
print(sorted(set(sys.modules) & {{"torch", "transformers", "onnx", {absent!r}}}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert run.returncode == 0, run.stderr
    count, refusal, modules = run.stdout.strip().split("\n")
    assert count == "3" and modules == "[]"
    extra = "onnx" if absent == "onnxruntime" else "openvino"
    assert f"needs {absent}, which is not installed; pip install 'roundexport[{extra}]'" in refusal
