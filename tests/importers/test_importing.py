"""From a quantized folder to an artifact: names, order, what stays float, what is said; and who refuses what."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from foreign_checkpoints import Grid, gptq_config, gptq_tensors, grid_of, rewrite_model

from roundexport import TuneSettings, convert, export, import_checkpoint, inspect, tune
from roundexport.conversion.package_size import package_bytes
from roundexport.errors import CheckpointError, UsageError, WontFitError
from roundexport.families.configurations import families
from roundexport.families.toy import write_model
from roundexport.formats.artifact import Artifact
from roundexport.model.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def gptq(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Grid]]:
    """A GPTQ v1 folder of a toy, and the grids in it."""
    folder = tmp_path_factory.mktemp("gptq") / "folder"

    def quantize(module: str, weight: np.ndarray) -> tuple[dict[str, np.ndarray], Grid]:
        grid = grid_of(weight, 4, 32, symmetric=False)
        return gptq_tensors(module, grid, 1), grid

    return folder, rewrite_model(models("llama, one block"), folder, gptq_config(1), quantize)


@pytest.fixture(scope="module")
def artifact(gptq: tuple[Path, dict[str, Grid]]) -> Artifact:
    out = gptq[0].parent / "artifact"
    return Artifact.open(import_checkpoint(gptq[0], out, progress=False))


def test_an_artifact_holds_the_very_integers(gptq: tuple[Path, dict[str, Grid]], artifact: Artifact) -> None:
    folder, grids = gptq
    assert set(artifact.names()) == set(grids)
    assert artifact.names()[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    for name, grid in grids.items():
        linear = artifact.linear(name)
        assert np.array_equal(linear.unpack(), grid.codes)
        assert np.array_equal(linear.full_zero_points(), grid.zeros)
        assert np.array_equal(linear.scales, grid.scales)
    manifest = artifact.manifest
    assert manifest.algorithm["name"] == "imported"
    assert manifest.algorithm["settings"]["format"] == "gptq"
    assert {name for name, _ in manifest.kept_float} == {"model.embed_tokens", "lm_head"}
    assert manifest.source["location"] == str(folder)
    assert "quantization_config" not in json.loads((artifact.path / "config.json").read_text())


def test_one_packed_matrix_is_three_of_the_model(tmp_path: Path) -> None:
    """nomic-bert's file has q, k and v as rows of one matrix: its integers are cut where its rows are."""
    write_model(families()["nomic_bert"], tmp_path / "float")

    def quantize(module: str, weight: np.ndarray) -> tuple[dict[str, np.ndarray], Grid]:
        grid = grid_of(weight, 4, 32, symmetric=True)
        return gptq_tensors(module, grid, 2), grid

    grids = rewrite_model(tmp_path / "float", tmp_path / "gptq", gptq_config(2, sym=True), quantize)
    whole = next(grid for module, grid in grids.items() if module.endswith("layers.0.attn.Wqkv"))
    artifact = Artifact.open(import_checkpoint(tmp_path / "gptq", tmp_path / "artifact", progress=False))
    own = [artifact.linear(f"layers.0.self_attn.{part}_proj") for part in "qkv"]
    assert np.array_equal(np.concatenate([linear.unpack() for linear in own]), whole.codes)
    assert np.array_equal(np.concatenate([linear.scales for linear in own]), whole.scales)


def test_the_folder_reads_as_a_float_model_of_its_dequantized_weights(gptq: tuple[Path, dict[str, Grid]]) -> None:
    checkpoint = Checkpoint.open(gptq[0])
    model = checkpoint.load_model()
    for name, grid in gptq[1].items():
        assert np.array_equal(checkpoint.float32(f"{name}.weight"), grid.weight())
        assert np.array_equal(checkpoint.float32(f"{name}.weight", (3, 7)), grid.weight()[3:7])
        assert np.array_equal(model.get_parameter(f"{name}.weight").detach().numpy(), grid.weight())
    assert not any(name.endswith(("qweight", "qzeros", "scales", "g_idx")) for name in checkpoint.names())


def test_a_package_of_it_holds_its_proofs(artifact: Artifact, tmp_path: Path) -> None:
    report = export(artifact.path, tmp_path / "onnx", to="onnx", progress=False)
    assert report.outputs is not None
    assert "quantization_config" not in json.loads((tmp_path / "onnx" / "config.json").read_text())


def test_inspect_says_how_it_is_quantized(gptq: tuple[Path, dict[str, Grid]]) -> None:
    found = inspect(gptq[0])
    assert "quantized already (GPTQ)" in found.facts["quantized"]
    assert [(row["scheme"], row["layers"]) for row in found.rows] == [("int4 g32 asym", 7)]


def test_room_is_counted_by_the_integers_that_are_there(gptq: tuple[Path, dict[str, Grid]]) -> None:
    checkpoint = Checkpoint.open(gptq[0])
    weights = sum(grid.codes.size for grid in gptq[1].values())
    floats = sum(math.prod(shape) for shape in checkpoint.owned().values()) - weights
    found = package_bytes(checkpoint, TuneSettings(bits=8))
    assert found == package_bytes(checkpoint, TuneSettings(bits=2))
    assert 4 * weights / 8 < found - 4 * floats < 5.2 * weights / 8  # codes; scales and zero points of groups of 32


def test_what_would_round_again_is_refused(gptq: tuple[Path, dict[str, Grid]], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"quantized already.*roundexport import"):
        tune(gptq[0], tmp_path / "artifact", progress=False)
    with pytest.raises(UsageError, match="so --bits, --steps can have no effect"):
        convert(gptq[0], tmp_path / "out", TuneSettings(bits=2, steps=3), progress=False)
    with pytest.raises(UsageError, match="roundexport import"):
        export(gptq[0], tmp_path / "onnx", progress=False)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused_before_it_begins(gptq: tuple[Path, dict[str, Grid]], tmp_path: Path) -> None:
    with pytest.raises(WontFitError, match=r"an import takes about .* GiB of memory .*max_ram is 0.001"):
        import_checkpoint(gptq[0], tmp_path / "out", max_ram=0.001, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_float_model_is_not_imported(models: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="roundexport tune makes some"):
        import_checkpoint(models("llama, one block"), tmp_path / "artifact", progress=False)
    assert not list(tmp_path.iterdir())
