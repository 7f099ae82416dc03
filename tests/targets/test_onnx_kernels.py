"""Packages whose products run by roundexport's own operator (kernels/native/)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_support import dequantized_model, record_losses, relative_rms, write_artifact, write_package

from roundexport.errors import ArtifactError, UnsupportedError, UsageError
from roundexport.formats.artifact import Artifact
from roundexport.formats.package import read_package
from roundexport.kernels.native import build
from roundexport.kernels.native.library import IN_PACKAGE
from roundexport.quant.spec import QuantSpec
from roundexport.runtime.generation import Decoder
from roundexport.runtime.loading import load
from roundexport.runtime.vendor_loop import LoopDecoder
from roundexport.targets.onnx import OnnxSettings, read_back

IDS = np.random.default_rng(0).integers(0, 96, (1, 12))


def made(
    models: Callable[[str], Path], folder: Path, spec: QuantSpec, embedding: QuantSpec | None, family: str = "llama"
) -> Artifact:
    return write_artifact(models(f"{family}, one block"), folder / "artifact", spec, embedding)


def kinds(package: Path) -> dict[str, set[tuple[int, str]]]:
    """Kind of product -> stored bits and type of the scales."""
    graph = onnx.load(package / "model.onnx", load_external_data=False).graph
    types = {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}
    found: dict[str, set[tuple[int, str]]] = {}
    for node in graph.node:
        if node.op_type in ("MatMulNBits", "GroupMatMul"):
            bits = next(attribute.i for attribute in node.attribute if attribute.name == "bits")
            found.setdefault(node.op_type, set()).add((bits, types[node.input[2]]))
    return found


@pytest.mark.parametrize(
    ("family", "spec", "embedding", "expected"),
    [
        ("llama", QuantSpec(3, 32, symmetric=False), QuantSpec(8, 32), {(3, "FLOAT16"), (8, "FLOAT16")}),
        ("llama", QuantSpec(4, 32, scale_dtype="float32"), None, {(4, "FLOAT")}),
        ("llama", QuantSpec(2, 64, symmetric=False), QuantSpec(3, 32), {(2, "FLOAT16"), (3, "FLOAT16")}),
        # what the embedding reads too is stored as it wants it
        ("qwen3", QuantSpec(3, 32), QuantSpec(3, 32), {(3, "FLOAT16"), (4, "FLOAT")}),
    ],
)
def test_a_package_runs_on_the_artifacts_integers(
    models: Callable[[str], Path],
    native: Path,
    tmp_path: Path,
    family: str,
    spec: QuantSpec,
    embedding: QuantSpec | None,
    expected: set[tuple[int, str]],
) -> None:
    import torch

    artifact, package = made(models, tmp_path, spec, embedding, family), tmp_path / "package"
    report = write_package(artifact, package, kernels=True)
    assert kinds(package) == {"GroupMatMul": expected} and report.fusions["GroupMatMul"] > 0
    assert read_package(package).settings["kernels"] is True
    found = read_back(package)
    assert all(found[name].equals(artifact.linear(name)) for name in artifact.names())
    with torch.no_grad():
        exact = dequantized_model(artifact)(torch.tensor(IDS)).logits.numpy()
    precise = load_decoder(package, precise=True)
    assert precise.info()["kernels"]
    assert relative_rms(precise.logits(IDS), exact) < 1e-5
    assert 1e-4 < relative_rms(load_decoder(package).logits(IDS), exact) < 0.05  # activations in eight bits


def load_decoder(package: Path, precise: bool = False) -> Decoder:
    found = load(package, threads=1, precise=precise)
    assert isinstance(found, Decoder)
    return found


def test_layers_with_float32_activations_stay_with_onnx_runtime(
    models: Callable[[str], Path], native: Path, tmp_path: Path
) -> None:
    artifact = made(models, tmp_path, QuantSpec(4, 32), None)
    names = [name for name in artifact.names() if name.endswith(("q_proj", "o_proj"))]
    losses = {name: 0.5 if name in names else 1e-5 for name in artifact.names()}
    record_losses(artifact.path, losses)
    write_package(Artifact.open(artifact.path), tmp_path / "package", kernels=True, activation_time=1.0)
    assert kinds(tmp_path / "package") == {"GroupMatMul": {(4, "FLOAT16")}, "MatMulNBits": {(4, "FLOAT")}}
    assert np.isfinite(load_decoder(tmp_path / "package").logits(IDS)).all()


def test_without_the_library_the_package_says_what_to_run(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    write_package(made(models, tmp_path, QuantSpec(4, 32), None), package, kernels=True)
    monkeypatch.setenv("ROUNDEXPORT_KERNELS", str(tmp_path / "none.so"))
    with pytest.raises(UnsupportedError, match=r"run: python -m roundexport\.kernels\.native\.build"):
        load(package)


def test_onnxruntime_genai_writes_the_same_with_the_library_in_the_folder(
    models: Callable[[str], Path], native: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime_genai")
    package = tmp_path / "package"
    write_package(made(models, tmp_path, QuantSpec(4, 32), None), package, kernels=True)
    for state in ("is not there", "is not the one that was built on this machine"):
        with pytest.raises(ArtifactError, match=rf"{IN_PACKAGE}, .* {state}; run: python -m .*build .*package"):
            load(package, engine="onnxruntime-genai", threads=1)
        (package / IN_PACKAGE).write_bytes(b"another's")
    assert build.put_into(package) == package / IN_PACKAGE
    theirs = load(package, engine="onnxruntime-genai", threads=1)
    assert isinstance(theirs, LoopDecoder)
    prompt = IDS[0].tolist()
    assert theirs.greedy([prompt], 8)[0].tolist() == load_decoder(package).greedy([prompt], 8)[0].tolist()


def test_kernels_go_with_what_they_can_run() -> None:
    for settings in ({"dialect": "standard"}, {"accuracy_level": 0}):
        with pytest.raises(UsageError, match="kernels go with"):
            OnnxSettings(kernels=True, **settings)
