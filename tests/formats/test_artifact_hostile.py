"""Hostile and damaged artifacts: each deviation from FORMAT.md is refused with a text that names it.

Hashes do not protect here: whoever forges a file forges its hash as well, so `_rehash` makes every manifest consistent
and what is left to find is the deviation itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from roundexport.errors import ArtifactError
from roundexport.formats.artifact import Artifact
from roundexport.formats.artifact_writer import ArtifactWriter
from roundexport.model.artifact_source import artifact_source
from roundexport.model.checkpoint import Checkpoint
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.storage.checksums import file_entry
from roundexport.storage.safetensors_reader import TensorFile
from roundexport.storage.safetensors_writer import write_tensors

SHARD = "quantized-00001-of-00001.safetensors"
LAYERS = [
    (LinearInfo("a", 13, 4), QuantSpec(3, None, False)),
    (LinearInfo("b", 32, 2, "embedding", ("head",)), QuantSpec(4, 16, True)),
]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, models: Callable[[str], Path]) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "artifact"
    folder.mkdir()
    checkpoint = Checkpoint.open(models("llama"))
    writer = ArtifactWriter(folder, LAYERS)
    for info, spec in LAYERS:
        grid = (info.out_features, spec.groups(info.in_features))
        codes = np.full((info.out_features, info.in_features), spec.max_code, np.uint8)
        zero_points = None if spec.symmetric else np.ones(grid, np.uint8)
        writer.add(info.name, QuantizedLinear.from_unpacked(spec, codes, np.ones(grid, np.float16), zero_points))
    writer.add_override("norm.weight", np.ones(3, np.float32))
    writer.finish(
        source=artifact_source(checkpoint),
        algorithm={"name": "rtn", "settings": {}},
        calibration={},
        kept_float=[("pooler", "outside the blocks")],
        versions={},
        side_files=checkpoint.copy_side_files(folder),
    )
    return folder


@pytest.fixture
def artifact(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "artifact"))


def _manifest(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return loaded


def _rehash(folder: Path, manifest: dict[str, Any] | None = None) -> None:
    """Write the manifest with the hashes of the files as they are now."""
    manifest = manifest or _manifest(folder)
    for name in manifest["files"]:
        if (folder / name).is_file():
            manifest["files"][name] = file_entry(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _refused(folder: Path, message: str, read: bool = False) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        opened = Artifact.open(folder)
        assert read, "opening should have failed already"
        for name in opened.names():
            opened.linear(name)
    assert str(folder) in str(caught.value)


def _change_tensors(folder: Path, change: Callable[[dict[str, tuple[str, np.ndarray[Any, Any]]]], object]) -> None:
    file = TensorFile(folder / SHARD)
    tensors = {name: (file.dtype(name), np.array(file.read(name))) for name in file.names}
    change(tensors)
    (folder / SHARD).unlink()
    write_tensors(folder / SHARD, tensors, {})
    _rehash(folder)


def test_the_pristine_artifact_opens_and_rehashing_keeps_it_so(artifact: Path) -> None:
    assert Artifact.open(artifact).linear("a").out_features == 4
    _change_tensors(artifact, lambda tensors: None)
    assert Artifact.open(artifact).linear("b").dequantize()[0, 0] == 15 - 8


# --- the folder ----------------------------------------------------------------------------------------------------


def test_a_folder_without_manifest_is_unfinished(artifact: Path) -> None:
    (artifact / "manifest.json").unlink()
    _refused(artifact, "is not an artifact, or was left unfinished: it has no manifest.json")
    _refused(artifact / "nowhere", "is not an artifact")


@pytest.mark.parametrize("name", [SHARD, "overrides.safetensors", "tokenizer.json", "config.json"])
def test_any_missing_truncated_or_flipped_file_is_refused(artifact: Path, name: str) -> None:
    raw = (artifact / name).read_bytes()
    (artifact / name).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    _refused(artifact, f"{name} is damaged or was changed: its sha256 is not the manifest's")
    (artifact / name).write_bytes(raw[:-1])
    _refused(artifact, f"{name} has {len(raw) - 1} bytes, the manifest says {len(raw)}: incomplete or changed")
    (artifact / name).unlink()
    _refused(artifact, f"the file {name} is missing")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "", "..", "a\\b", "C:/x"])
def test_a_name_that_leaves_the_folder_is_refused(artifact: Path, name: str) -> None:
    (artifact.parent / "secret").write_text("s")
    manifest = _manifest(artifact)
    manifest["files"][name] = file_entry(artifact.parent / "secret")
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    _refused(artifact, "is refused; names are relative and stay inside the folder")


@pytest.mark.parametrize("name", [SHARD, "tokenizer.json", "overrides.safetensors", "manifest.json"])
def test_a_link_that_leaves_the_folder_is_refused(artifact: Path, name: str) -> None:
    shutil.move(artifact / name, artifact.parent / "secret")
    (artifact / name).symlink_to("../secret")
    _refused(artifact, f"{name} is a link that leaves the folder")


def test_a_fifo_in_place_of_a_file_is_refused_without_waiting(artifact: Path) -> None:
    import os

    (artifact / "tokenizer.json").unlink()
    os.mkfifo(artifact / "tokenizer.json")
    _refused(artifact, "the file tokenizer.json is missing")


def test_files_the_manifest_does_not_list_are_never_read(artifact: Path) -> None:
    (artifact / "README.md").write_text("a model card")
    (artifact / "quantized-00002-of-00002.safetensors").write_bytes(b"garbage")
    assert Artifact.open(artifact).names() == ["a", "b"]


# --- the manifest --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", ["roundexport/2", "roundexport-package/1", None, 1])
def test_another_format_is_refused_whatever_else_is_in_it(artifact: Path, found: Any) -> None:
    (artifact / "manifest.json").write_text(json.dumps({"format": found, "future": True}))
    _refused(artifact, f"manifest.json: its format is {found!r}; this version of roundexport reads 'roundexport/1'")


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Change the value at a dotted path; ``...`` removes it."""

    def change(manifest: Any) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in parents:
            manifest = manifest[part]
        if value is ...:
            del manifest[last]
        else:
            manifest[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("surprise", 1), "manifest.json: unknown key 'surprise'"),
        (_set("source.extra", 1), r"manifest.json\.source: unknown key 'extra'"),
        (_set("layers.0.info.extra", 1), r"layers\[0\]\.info: unknown key 'extra'"),
        (_set("layers.0.spec.extra", 1), r"layers\[0\]\.spec: unknown key 'extra'"),
        (_set("files.config.json", 1), "files"),
        (_set("versions", ...), "key 'versions' is missing"),
        (_set("source.digest", ...), "key 'digest' is missing"),
        (
            _set("source.task", "no such task"),
            "expected one of 'generate', 'embed', .*, found 'no such task'",
        ),
        (_set("layers", {}), "layers: expected an array, found an object"),
        (_set("layers.0.info.in_features", "13"), "in_features: expected a whole number, found '13'"),
        (_set("layers.0.info.in_features", 13.0), "in_features: expected a whole number"),
        (_set("layers.0.info.kind", "conv"), "kind: expected one of 'linear', 'embedding', found 'conv'"),
        (_set("layers.0.spec.bits", 5), r"layers\[0\]\.spec: bits 5 is not supported"),
        (_set("layers.0.spec.bits", True), "bits: expected a whole number, found True"),
        (_set("layers.1.spec.group_size", 48), "group_size 48 is not supported"),
        (_set("layers.1.spec.group_size", 128), "b: group_size 128 does not divide K=32"),
        (_set("layers.0.info.in_features", 0), "a: K=0 is not a positive number"),
        (_set("layers.0.info.out_features", 0), "a: N=0 is not positive"),
        (_set("layers.0.loss_after", "low"), "loss_after: expected a number, found 'low'"),
        (_set("layers.1.info.name", "a"), "the layer a is listed twice"),
        (_set("layers.1.info.shared_with", ["a"]), "the layer a is listed twice"),
        (_set("kept_float", [["head", "why"]]), "the layer head is listed twice"),
        (_set("kept_float", [["head"]]), "expected an array of 2"),
        (_set("files.manifest.json", {}), ""),
    ],
)
def test_a_manifest_that_deviates_is_refused(
    artifact: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    manifest = _manifest(artifact)
    if not message or message == "files":  # names with a dot cannot be given as a path
        manifest["files"]["manifest.json" if not message else "config.json"] = {"sha256": "", "size": 0}
        message = "the manifest lists itself" if not message else "config.json has .* bytes, the manifest says 0"
    else:
        change(manifest)
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    _refused(artifact, message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"layers":', '"layers": [], "layers":', "the key 'layers' appears twice"),
        ('"versions": {}', '"versions": {"a": NaN}', "NaN is no JSON number"),
        ('"loss_after": null', '"loss_after": 1e999', "1e999 is out of range"),
        ('"loss_after": null', '"loss_after": -Infinity', "-Infinity is no JSON number"),
        ("{", "[", "not valid JSON"),
    ],
)
def test_json_that_is_not_strict_is_refused(artifact: Path, old: str, new: str, message: str) -> None:
    text = (artifact / "manifest.json").read_text()
    assert old in text
    (artifact / "manifest.json").write_text(text.replace(old, new, 1))
    _refused(artifact, message)


# --- the tensors ---------------------------------------------------------------------------------------------------


def test_a_layer_without_tensors_is_refused(artifact: Path) -> None:
    _change_tensors(artifact, lambda tensors: tensors.pop("a.zero_points"))
    _refused(artifact, "1 tensors are missing, the first is a.zero_points")


def test_a_tensor_without_layer_is_refused(artifact: Path) -> None:
    _change_tensors(artifact, lambda tensors: tensors.update({"c.codes": ("U8", np.zeros((1, 1), np.uint8))}))
    _refused(artifact, "the tensor c.codes belongs to no layer of the manifest")


def test_zero_points_of_a_symmetric_layer_are_refused(artifact: Path) -> None:
    _change_tensors(artifact, lambda tensors: tensors.update({"b.zero_points": ("U8", np.full((2, 2), 8, np.uint8))}))
    _refused(artifact, "the tensor b.zero_points belongs to no layer")


@pytest.mark.parametrize(
    ("name", "dtype", "values", "message"),
    [
        (
            "a.codes",
            "U8",
            np.zeros((4, 6), np.uint8),
            r"a.codes is U8 \[4, 6\], the manifest's layer needs U8 \[4, 5\]",
        ),
        ("a.codes", "I8", np.zeros((4, 5), np.int8), r"a.codes is I8 \[4, 5\], the manifest's layer needs U8"),
        ("a.scales", "F32", np.ones((4, 1), np.float32), r"a.scales is F32 \[4, 1\], .* needs F16 \[4, 1\]"),
        ("a.scales", "BF16", np.ones((4, 1), np.uint16), r"a.scales is BF16 \[4, 1\], .* needs F16 \[4, 1\]"),
        ("b.scales", "F16", np.ones((2, 1), np.float16), r"b.scales is F16 \[2, 1\], .* needs F16 \[2, 2\]"),
        ("b.scales", "F16", np.ones(4, np.float16), r"b.scales is F16 \[4\], .* needs F16 \[2, 2\]"),
    ],
)
def test_a_tensor_of_wrong_shape_or_dtype_is_refused(
    artifact: Path, name: str, dtype: str, values: np.ndarray[Any, Any], message: str
) -> None:
    _change_tensors(artifact, lambda tensors: tensors.update({name: (dtype, values)}))
    _refused(artifact, message)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_scale_that_is_not_finite_is_refused_when_the_layer_is_read(artifact: Path, value: float) -> None:
    _change_tensors(artifact, lambda tensors: tensors["b.scales"][1].__setitem__((1, 0), value))
    _refused(artifact, "layer b: scales hold values that are not finite", read=True)


def test_a_zero_point_out_of_range_is_refused_when_the_layer_is_read(artifact: Path) -> None:
    _change_tensors(artifact, lambda tensors: tensors["a.zero_points"][1].__setitem__((2, 0), 8))
    _refused(artifact, "layer a: zero point 8 does not fit in 3 bits", read=True)


def test_stray_bits_after_a_row_are_refused_when_the_layer_is_read(artifact: Path) -> None:
    _change_tensors(artifact, lambda tensors: tensors["a.codes"][1].__setitem__((3, 4), 0xFF))  # 13·3 bits: 7 used
    _refused(artifact, "layer a: bits after the last code of a row must be zero", read=True)


def test_a_tensor_in_two_files_is_refused(artifact: Path) -> None:
    manifest = _manifest(artifact)
    second = "quantized-00002-of-00002.safetensors"
    shutil.copyfile(artifact / SHARD, artifact / second)
    manifest["files"][second] = {}
    _rehash(artifact, manifest)
    _refused(artifact, f"the tensor a.codes is in {SHARD} too")


def test_overlapping_tensors_are_refused(artifact: Path) -> None:
    raw = (artifact / SHARD).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["a.scales"]["data_offsets"] = header["b.scales"]["data_offsets"]
    text = json.dumps(header).encode()
    (artifact / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    _rehash(artifact)
    _refused(artifact, f"{SHARD}: (b.scales overlaps another tensor|a.scales leaves a gap)")


def test_a_truncated_tensor_file_with_a_forged_hash_is_refused(artifact: Path) -> None:
    (artifact / SHARD).write_bytes((artifact / SHARD).read_bytes()[:-1])
    _rehash(artifact)
    _refused(artifact, "the file is truncated")


def test_overrides_of_another_dtype_are_refused(artifact: Path) -> None:
    (artifact / "overrides.safetensors").unlink()
    write_tensors(artifact / "overrides.safetensors", {"x": ("F16", np.ones(2, np.float16))}, {})
    _rehash(artifact)
    _refused(artifact, "x is F16; overrides are F32")


I8, U8 = ("I8", np.ones(2, np.int8)), ("U8", np.full(1, 64, np.uint8))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x.int8": I8}, r"x\.int8 needs x\.exponent, U8 \[1\]"),
        ({"x.exponent": U8}, r"x\.exponent belongs to no x\.int8"),
        ({"x.int8": I8, "x.exponent": ("U8", np.full(2, 64, np.uint8))}, r"x\.int8 needs x\.exponent"),
        ({"x.int8": I8, "x.exponent": ("F32", np.ones(1, np.float32))}, r"x\.int8 needs x\.exponent"),
        ({"x.int8": I8, "x.exponent": U8, "x": ("F32", np.ones(2, np.float32))}, "x is there in two forms"),
        ({"x": I8}, "x is I8; overrides are F32"),
        ({"x.int8": U8, "x.exponent": U8}, r"x\.int8 is U8; overrides are F32|belongs to no"),
    ],
)
def test_overrides_in_eight_bits_that_deviate_are_refused(
    artifact: Path, tensors: dict[str, tuple[str, np.ndarray[Any, Any]]], message: str
) -> None:
    (artifact / "overrides.safetensors").unlink()
    write_tensors(artifact / "overrides.safetensors", tensors, {})
    _rehash(artifact)
    _refused(artifact, message)


def test_scales_that_are_no_bytes_are_refused_where_powers_of_two_are_announced(artifact: Path) -> None:
    manifest = _manifest(artifact)
    manifest["layers"][1]["spec"]["scale_dtype"] = "exponent8"
    _rehash(artifact, manifest)
    _refused(artifact, r"b.scales is F16 \[2, 2\], the manifest's layer needs U8 \[2, 2\]")


@pytest.mark.parametrize("seed", range(200))
def test_random_damage_never_goes_unnoticed(artifact: Path, seed: int) -> None:
    """One flipped byte anywhere, hashes not forged: refused. manifest.json itself has no hash, so there it may also
    change a value no other file contradicts; what is asserted is that nothing but ArtifactError comes out."""
    rng = np.random.default_rng(seed)
    paths = sorted(path for path in artifact.rglob("*") if path.is_file())
    path = paths[seed % len(paths)]
    raw = bytearray(path.read_bytes())
    raw[int(rng.integers(len(raw)))] ^= int(rng.integers(1, 256))
    path.write_bytes(raw)
    try:
        opened = Artifact.open(artifact)
        for name in opened.names():
            opened.linear(name)
    except ArtifactError as error:
        assert str(artifact) in str(error)
    else:
        assert path.name == "manifest.json"
