"""Package manifests: round trip, every file hashed, and each deviation from FORMAT.md refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from roundexport.errors import ArtifactError
from roundexport.formats.artifact import Artifact
from roundexport.formats.artifact_writer import ArtifactWriter
from roundexport.formats.package import PackageManifest, package_source, read_package, write_manifest
from roundexport.model.artifact_source import artifact_source
from roundexport.model.checkpoint import Checkpoint

DECODER = PackageManifest(
    target="onnx",
    task="generate",
    model_file="model.onnx",
    model_type="llama",
    kv=({"layer": 0, "num_kv_heads": 2, "head_dim": 16}, {"layer": 1, "num_kv_heads": 2, "head_dim": 16}),
    vocab_size=384,
    hidden_size=64,
    max_context=512,
    tokens={"bos": None, "eos": (0, 2), "pad": 1},
    pooling=None,
    settings={"accuracy_level": 4},
    source={"location": "m", "digest": "d", "artifact": "a", "calibration": {"kind": "self"}},
    layers={"model.layers.0.mlp.up_proj": {"bits": 4, "group_size": None, "symmetric": True, "stored": "MatMulNBits"}},
    kept_float=(("lm_head", "asked for"),),
    fusions={"skip_norm": 4},
    versions={"onnx": "1.23"},
)
ENCODER = dataclasses.replace(
    DECODER, target="openvino", task="embed", kv=(), pooling={"mode": "cls", "normalize": True}, model_file="sub/m.xml"
)


def _files(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    for name in ("model.onnx", "model.onnx.data", "sub/m.xml", "tokenizer.json"):
        (folder / name).write_text(f"this is {name}")
    return folder


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = _files(tmp_path / "package")
    write_manifest(folder, DECODER)
    return folder


@pytest.mark.parametrize("manifest", [DECODER, ENCODER])
def test_round_trip(tmp_path: Path, manifest: PackageManifest) -> None:
    folder = _files(tmp_path / "package")
    written = write_manifest(folder, manifest)
    assert read_package(folder) == written
    assert dataclasses.replace(written, files={}) == manifest
    assert set(written.files) == {"model.onnx", "model.onnx.data", "sub/m.xml", "tokenizer.json"}
    assert written.to_json()["format"] == "roundexport-package/1"


def test_equal_packages_are_equal_bytes_and_writing_again_changes_nothing(tmp_path: Path, package: Path) -> None:
    first = (package / "roundexport.json").read_bytes()
    write_manifest(package, DECODER)
    assert (package / "roundexport.json").read_bytes() == first
    write_manifest(_files(tmp_path / "other"), DECODER)
    assert (tmp_path / "other" / "roundexport.json").read_bytes() == first


def test_source_comes_from_the_artifact(tmp_path: Path, models: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    ArtifactWriter(tmp_path, []).finish(
        source=artifact_source(checkpoint), algorithm={"name": "rtn", "settings": {}}, calibration={"k": 1}, versions={}
    )
    artifact = Artifact.open(tmp_path)
    assert package_source(artifact) == {
        "location": str(models("llama")), "digest": checkpoint.digest, "artifact": artifact.digest,
        "calibration": {"k": 1},
    }  # fmt: skip


def test_reading_imports_no_torch(package: Path) -> None:
    code = (
        "import sys; from roundexport.formats.package import read_package; read_package(sys.argv[1])\n"
        "print(sorted({'torch', 'transformers', 'onnx', 'openvino'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(package)], capture_output=True, text=True, check=True
    ).stdout
    assert found.strip() == "[]"


def test_a_folder_without_manifest_is_no_package(package: Path) -> None:
    (package / "roundexport.json").unlink()
    with pytest.raises(ArtifactError, match=r"is not a package, or was left unfinished: it has no roundexport\.json"):
        read_package(package)
    with pytest.raises(ArtifactError, match="is not a package"):
        read_package(package / "nowhere")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "sub/m.xml", "tokenizer.json"])
def test_a_flipped_byte_a_cut_or_a_missing_file_is_refused(package: Path, name: str) -> None:
    raw = (package / name).read_bytes()
    (package / name).write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    with pytest.raises(ArtifactError, match=f"{name} is damaged or was changed: its sha256"):
        read_package(package)
    assert read_package(package, check_hashes=False).target == "onnx"
    (package / name).write_bytes(raw[:-1])
    with pytest.raises(ArtifactError, match=f"{name} has {len(raw) - 1} bytes, the manifest says {len(raw)}"):
        read_package(package, check_hashes=False)
    (package / name).unlink()
    with pytest.raises(ArtifactError, match=f"the file {name} is missing"):
        read_package(package, check_hashes=False)


def test_a_file_that_became_a_link_is_refused(package: Path) -> None:
    shutil.move(package / "tokenizer.json", package.parent / "secret")
    (package / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is a link that leaves the folder"):
        read_package(package)


def test_files_added_later_are_ignored(package: Path) -> None:
    (package / "cache").mkdir()
    (package / "cache" / "blob").write_text("made by a runtime")
    assert "cache/blob" not in read_package(package).files


def _change(package: Path, **changes: Any) -> None:
    data = json.loads((package / "roundexport.json").read_text())
    (package / "roundexport.json").write_text(json.dumps({**data, **changes}))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/../../x", "a\\b", ""])
def test_a_name_that_leaves_the_folder_is_refused(package: Path, name: str) -> None:
    entry = {"sha256": "0" * 64, "size": 1}
    _change(package, files={"model.onnx": entry, name: entry})
    with pytest.raises(ArtifactError, match="is refused; names are relative and stay inside the folder"):
        read_package(package)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format": "roundexport-package/2"},
            "its format is 'roundexport-package/2'; this version of roundexport reads",
        ),
        ({"format": "roundexport/1"}, "its format is 'roundexport/1'"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"target": "tensorrt"}, "target: expected one of 'onnx', 'openvino', found 'tensorrt'"),
        ({"task": "no such task"}, "task: expected one of 'generate', 'embed'"),
        ({"model_file": "other.onnx"}, "model_file 'other.onnx' is not among the files"),
        ({"model_file": "../model.onnx"}, "is not among the files"),
        ({"vocab_size": 0}, "sizes must be positive"),
        ({"max_context": -1}, "sizes must be positive"),
        ({"max_context": "512"}, "max_context: expected a whole number, found '512'"),
        ({"tokens": {"bos": None, "eos": 0, "pad": None}}, "tokens.eos: expected an array"),
        ({"tokens": {"bos": None, "eos": [0], "pad": None, "unk": 1}}, "tokens: unknown key 'unk'"),
        ({"pooling": {"mode": "mean", "normalize": True}}, "a package that generates has no pooling"),
        ({"task": "embed"}, "a package that embeds needs pooling and has no kv"),
        ({"kv": [{"layer": 0, "num_kv_heads": 0, "head_dim": 16}]}, "sizes must be positive"),
        ({"kv": [{"layer": 1, "num_kv_heads": 1, "head_dim": 1}] * 2}, "kv must list its layers once each, in order"),
        ({"layers": {"x": {"bits": 5, "group_size": 32, "symmetric": True, "stored": "s"}}}, "layer x has impossible"),
        ({"layers": {"x": {"bits": 4, "group_size": 0, "symmetric": True, "stored": "s"}}}, "layer x has impossible"),
        ({"layers": {"x": {"bits": 4, "group_size": 32, "symmetric": 1, "stored": "s"}}}, "expected true or false"),
        ({"source": {"location": "m"}}, "source: key 'artifact' is missing"),
        ({"files": {"roundexport.json": {"sha256": "", "size": 0}}}, "not among the files|lists itself"),
        ({"fusions": {"rule": "many"}}, "fusions.rule: expected a whole number"),
    ],
)
def test_a_manifest_that_deviates_is_refused(package: Path, changes: dict[str, Any], message: str) -> None:
    _change(package, **changes)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_package(package)
    assert str(package / "roundexport.json") in str(caught.value)


def test_a_missing_key_is_refused(package: Path) -> None:
    data = json.loads((package / "roundexport.json").read_text())
    for key in sorted(data):
        (package / "roundexport.json").write_text(json.dumps({k: v for k, v in data.items() if k != key}))
        with pytest.raises(ArtifactError, match=f"key '{key}' is missing|its format is None"):
            read_package(package)


def test_duplicate_keys_are_refused(package: Path) -> None:
    text = (package / "roundexport.json").read_text()
    (package / "roundexport.json").write_text(text.replace("{", '{"target": "openvino",', 1))
    with pytest.raises(ArtifactError, match="the key 'target' appears twice"):
        read_package(package)


def test_the_writer_refuses_links_and_contradictions_and_writes_nothing(tmp_path: Path) -> None:
    folder = _files(tmp_path / "package")
    with pytest.raises(ArtifactError, match=r"model_file 'gone\.onnx' is not among the files"):
        write_manifest(folder, dataclasses.replace(DECODER, model_file="gone.onnx"))
    (folder / "link").symlink_to("model.onnx")
    with pytest.raises(ArtifactError, match="'link' cannot be part of a package; only plain files can"):
        write_manifest(folder, DECODER)
    assert not (folder / "roundexport.json").exists()
