"""The comparison before a package is kept: right packages pass, and what integers do not show is refused by number."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from conftest import ROOT
from roundexport.environment.memory import GIB
from roundexport.errors import UnsupportedError
from roundexport.formats.artifact import Artifact
from roundexport.formats.package import read_package
from roundexport.model.checkpoint import Checkpoint
from roundexport.runtime.engines import ort
from roundexport.runtime.engines._ort_decoder import OrtSession
from roundexport.runtime.engines._ov_paged import PagedSession
from roundexport.targets import export as exporting
from roundexport.targets import output_check
from roundexport.targets.interface import ExportReport, load_target
from roundexport.targets.output_check import LEAST_SECTION, OutputCheck, check_outputs, section_bytes

GOLDEN = ROOT / "tests" / "golden"
TARGETS = ("onnx", "openvino")


def check(folder: Path) -> OutputCheck:
    return check_outputs(folder, Artifact.open(GOLDEN / "artifact"), Checkpoint.open(GOLDEN / "model"))


@pytest.mark.parametrize("target", TARGETS)
def test_a_right_package_passes(target: str) -> None:
    found = check(GOLDEN / target)
    assert 0 < found.difference < 1e-5
    # Two whole rows of 24; the last of a prompt and two tokens more, of 24 and of 17; two pieces and two tokens.
    assert found.tokens == 2 * 24 + 2 * (1 + 2) + (2 + 2) and found.longest == 24
    assert str(found).startswith("outputs within ")
    assert 0 <= found.shipped < 1e-3 and found.notes(target) == ()


def spoil_onnx(folder: Path, name: str, place: int, value: float) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    stored = {entry.key: entry.value for entry in tensor.external_data}
    path = folder / ("model.onnx.data" if stored else "model.onnx")
    data = bytearray(path.read_bytes())
    start = int(stored["offset"]) if stored else bytes(data).index(tensor.raw_data)
    write(path, data, start + 4 * place, value)


def spoil_openvino(folder: Path, name: str, place: int, value: float) -> None:
    graph = (folder / "openvino_model.xml").read_text()
    found = re.search(rf'name="{re.escape(name)}" type="Const".*?offset="(\d+)"', graph, re.DOTALL)
    assert found is not None
    path = folder / "openvino_model.bin"
    write(path, bytearray(path.read_bytes()), int(found[1]) + 4 * place, value)


def write(path: Path, data: bytearray, start: int, value: float) -> None:
    data[start : start + 4] = np.float32(value).tobytes()
    path.write_bytes(bytes(data))


NORM = "model.model.layers.1.input_layernorm.weight"
# (target, tensor, place, value, what the refusal names)
SPOILED = [
    ("onnx", NORM, 3, 1.5, "token"),
    ("onnx", "rotary_cos.0", 20 * 8, 0.0, r"token 2[1-4] of 24"),  # row 20 of the table: from the 21st token on
    ("openvino", "Constant_211", 3, 1.5, "token"),  # the same norm
]


@pytest.mark.parametrize(("target", "name", "place", "value", "where"), SPOILED)
def test_a_wrong_number_beside_right_integers_is_refused(
    target: str, name: str, place: int, value: float, where: str, tmp_path: Path
) -> None:
    shutil.copytree(GOLDEN / target, tmp_path / "p")
    (spoil_onnx if target == "onnx" else spoil_openvino)(tmp_path / "p", name, place, value)
    with pytest.raises(UnsupportedError, match=rf"\d standard deviations away .*{where}"):
        check(tmp_path / "p")


@pytest.fixture
def small_sections(monkeypatch) -> None:
    """Packages do not fit, and are run in sections: four of the golden one's."""
    monkeypatch.setattr(output_check, "section_bytes", lambda manifest, limit: 10_000)


@pytest.mark.parametrize("target", TARGETS)
def test_a_package_that_does_not_fit_is_compared_in_sections(target: str, small_sections: None) -> None:
    found = check(GOLDEN / target)
    # Two whole rows of 24; the first in two pieces and two tokens, of 8 and 14; the second's 15 and nine more.
    assert 0 < found.difference < 1e-5 and found.tokens == 2 * 24 + 24 + 24
    assert 0 <= found.shipped < 1e-3 and found.engine.endswith("in sections")


def test_a_wrong_number_is_found_in_a_section(small_sections: None, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "onnx", tmp_path / "p")
    spoil_onnx(tmp_path / "p", "rotary_cos.0", 20 * 8, 0.0)
    with pytest.raises(UnsupportedError, match=r"in sections .* token 2[1-4] of 24"):
        check(tmp_path / "p")


def test_sections_are_for_what_does_not_fit() -> None:
    manifest = read_package(GOLDEN / "onnx", check_hashes=False)
    size = sum(entry["size"] for entry in manifest.files.values())
    room = SimpleNamespace(left=lambda: 2 * size)
    assert section_bytes(manifest, room) is None
    room = SimpleNamespace(left=lambda: 2 * size - 1)
    assert section_bytes(manifest, room) == LEAST_SECTION
    large = replace(manifest, files={"model.onnx.data": {"size": 20 * GIB, "sha256": ""}})
    assert section_bytes(large, SimpleNamespace(left=lambda: 5 * GIB)) == GIB
    assert section_bytes(replace(large, task="translate"), SimpleNamespace(left=lambda: 5 * GIB)) is None


@pytest.mark.parametrize(("target", "session"), [("onnx", OrtSession), ("openvino", PagedSession)])
def test_what_is_wrong_with_a_filled_cache_only_is_found(target: str, session: type, monkeypatch) -> None:
    right = session.extend

    def wrong(self, new):
        filled = min(map(self.length, new)) > 0
        return right(self, new) + 0.01 * (filled and max(map(self.length, new)) > 22)

    monkeypatch.setattr(session, "extend", wrong)
    with pytest.raises(UnsupportedError, match=r"token by token, row [12], token \d+ of 24"):
        check(GOLDEN / target)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_a_number_is_refused(value: float, monkeypatch) -> None:
    right = ort.OrtDecoder.logits
    monkeypatch.setattr(ort.OrtDecoder, "logits", lambda self, ids: right(self, ids) + np.float32(value))
    with pytest.raises(UnsupportedError, match="inf standard deviations away"):
        check(GOLDEN / "onnx")


@pytest.mark.parametrize(("loss", "told"), [(0.02, False), (0.2, True)])
def test_a_loss_as_shipped_is_told_beyond_a_bound(loss: float, told: bool) -> None:
    found = OutputCheck(1e-6, "a whole prompt", 1e-3, 64, 24, "onnxruntime 1.31.1", shipped=loss, seconds=0.1)
    assert [f"{loss} nats" in note and "--accuracy-level 0" in note for note in found.notes("onnx")] == [True] * told
    assert "accuracy-level" not in "".join(found.notes("openvino"))


def test_a_package_without_numbers_as_shipped_is_refused(monkeypatch) -> None:
    right = ort.OrtDecoder.logits

    def wrong(self, ids):
        return right(self, ids) + np.float32(0 if self.info()["precise"] else np.nan)

    monkeypatch.setattr(ort.OrtDecoder, "logits", wrong)
    with pytest.raises(UnsupportedError, match="no finite numbers"):
        check(GOLDEN / "onnx")


def test_a_model_that_amplifies_rounding_is_given_what_it_amplifies(monkeypatch) -> None:
    # One thousandth of the tolerance: the golden package is beyond it, and within the model's own answer to noise.
    monkeypatch.setattr(output_check, "TOLERANCE", 1e-9)
    found = check(GOLDEN / "onnx")
    assert 1e-9 < found.difference < found.tolerance < 1e-4
    monkeypatch.setattr(output_check, "NOISES", 1e-3)
    with pytest.raises(UnsupportedError, match="is not kept"):
        check(GOLDEN / "onnx")


def test_of_a_refused_package_nothing_is_kept(tmp_path: Path, monkeypatch) -> None:
    def copies_a_wrong_package(artifact, checkpoint, out, settings):
        shutil.copytree(GOLDEN / "onnx", out, dirs_exist_ok=True)
        spoil_onnx(out, NORM, 3, 1.5)
        return ExportReport("onnx", ())

    target = replace(load_target("onnx"), export=copies_a_wrong_package)
    monkeypatch.setattr(exporting, "load_target", lambda name: target)
    with pytest.raises(UnsupportedError, match="standard deviations away"):
        exporting.export(GOLDEN / "artifact", tmp_path / "out", to="onnx", model=GOLDEN / "model")
    assert list(tmp_path.iterdir()) == []
