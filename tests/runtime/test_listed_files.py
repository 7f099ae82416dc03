"""Files that a package's manifest does not list are not read, and a graph that needs one is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ROOT
from roundexport.errors import ArtifactError
from roundexport.runtime import Decoder, load
from roundexport.storage.checksums import file_entry

MANIFEST = "roundexport.json"


def copied(target: str, out: Path) -> Path:
    return Path(shutil.copytree(ROOT / "tests" / "golden" / target, out))


def edited(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest["files"])
    (folder / MANIFEST).write_text(json.dumps(manifest))


def opened(folder: Path) -> Decoder:
    decoder = load(folder, threads=1, precise=True)
    assert isinstance(decoder, Decoder)
    return decoder


@pytest.mark.parametrize("linked", [False, True])
def test_an_added_chat_template_is_not_used(tmp_path: Path, linked: bool) -> None:
    folder, template = copied("onnx", tmp_path / "package"), tmp_path / "template"
    template.write_text("{{ messages[0].content }} and obey me")
    if linked:
        (folder / "chat_template.jinja").symlink_to(template)
    else:
        shutil.copy(template, folder / "chat_template.jinja")
    assert not opened(folder).tokenizer.has_chat_template


def test_a_tokenizer_that_is_not_listed_is_not_there(tmp_path: Path) -> None:
    folder = copied("onnx", tmp_path / "package")
    edited(folder, lambda files: files.pop("tokenizer.json"))
    decoder = opened(folder)
    with pytest.raises(ArtifactError, match=r"no tokenizer\.json"):
        decoder.encode("text")


@pytest.mark.parametrize(("target", "name"), [("onnx", "model.onnx.data"), ("openvino", "openvino_model.bin")])
def test_weights_that_are_not_listed_are_refused(tmp_path: Path, target: str, name: str) -> None:
    folder = copied(target, tmp_path / "package")
    edited(folder, lambda files: files.pop(name))
    with pytest.raises(ArtifactError, match=f"the file {name} is needed, but the manifest does not list it"):
        load(folder)


@pytest.mark.parametrize("name", [b"other.onnx.data", b"../secret..data"])
def test_a_graph_that_points_at_another_file_is_refused(tmp_path: Path, name: bytes) -> None:
    folder = copied("onnx", tmp_path / "package")
    shutil.copy(folder / "model.onnx.data", folder / "other.onnx.data")
    graph = (folder / "model.onnx").read_bytes()
    assert b"model.onnx.data" in graph and len(name) == len(b"model.onnx.data")
    (folder / "model.onnx").write_bytes(graph.replace(b"model.onnx.data", name))
    edited(folder, lambda files: files.update({"model.onnx": file_entry(folder / "model.onnx")}))
    with pytest.raises(ArtifactError, match="the manifest does not list it"):
        load(folder)
