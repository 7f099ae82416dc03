"""Artifacts: round trip, equal bytes whatever the order or interruption, and shards."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import roundexport.formats
from roundexport.errors import ArtifactError, SpecError, WontFitError
from roundexport.formats.artifact import Artifact
from roundexport.formats.artifact_manifest import LayerEntry, Manifest
from roundexport.formats.artifact_writer import ArtifactWriter
from roundexport.formats.package import PackageManifest
from roundexport.model.artifact_source import artifact_source
from roundexport.model.checkpoint import Checkpoint
from roundexport.quant import power_of_two
from roundexport.quant.int8_tensor import Int8Tensor
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.storage.atomic import write_folder
from roundexport.storage.strict_json import encode

LAYERS: list[tuple[LinearInfo, QuantSpec]] = [
    (LinearInfo("embed", 64, 40, "embedding", ("lm_head",)), QuantSpec(8, 32, True)),
    (LinearInfo("blocks.0.up", 64, 96), QuantSpec(4, 32, True)),
    (LinearInfo("blocks.0.down", 96, 64), QuantSpec(3, None, False)),
    (LinearInfo("blocks.1.up", 64, 96), QuantSpec(2, 16, False, "float32")),
    (LinearInfo("blocks.1.down", 13, 64), QuantSpec(3, None, True)),
    (LinearInfo("head", 64, 8), QuantSpec(4, 16, False, "exponent8")),
]
NAMES = [info.name for info, _ in LAYERS]


def _linear(info: LinearInfo, spec: QuantSpec) -> QuantizedLinear:
    rng = np.random.default_rng(sum(map(ord, info.name)))
    grid = (info.out_features, spec.groups(info.in_features))
    codes = rng.integers(0, spec.max_code + 1, (info.out_features, info.in_features)).astype(np.uint8)
    zero_points = None if spec.symmetric else rng.integers(0, spec.max_code + 1, grid).astype(np.uint8)
    scales = rng.standard_normal(grid).astype(spec.scale_array)
    scales = power_of_two.nearest(scales) if spec.scale_dtype == "exponent8" else scales
    return QuantizedLinear.from_unpacked(spec, codes, scales, zero_points)


BIAS = Int8Tensor.nearest(np.linspace(-1, 0.7, 6, dtype=np.float32).reshape(2, 3))
LINEARS = {info.name: _linear(info, spec) for info, spec in LAYERS}


def _finish(writer: ArtifactWriter, checkpoint: Checkpoint) -> Manifest:
    return writer.finish(
        source=artifact_source(checkpoint),
        algorithm={"name": "rtn", "settings": {"clip": 1.0}},
        calibration={"kind": "self", "seed": 42},
        kept_float=[("pooler", "outside the blocks")],
        versions={"numpy": "2"},
        losses={"blocks.0.up": (0.5, 0.25)},
        side_files=checkpoint.copy_side_files(writer.folder),
    )


def _add_overrides(writer: ArtifactWriter) -> None:
    writer.add_override("norm.weight", np.arange(5, dtype=np.float32))
    writer.add_override("norm.bias", BIAS)


def _write(
    out: Path,
    checkpoint: Checkpoint,
    order: Sequence[str] = NAMES,
    shard_bytes: int = 1 << 30,
    pause: int | None = None,
) -> Path:
    """Write the artifact in this order; with ``pause``, abandon it after so many layers and take it up again."""
    with write_folder(out) as folder:
        writer = ArtifactWriter(folder, LAYERS, shard_bytes=shard_bytes)
        try:
            for position, name in enumerate(order):
                if position == pause:
                    writer.sync()
                    writer.close()
                    writer = ArtifactWriter(folder, LAYERS, order[:position], shard_bytes=shard_bytes)
                writer.add(name, LINEARS[name])
            _add_overrides(writer)
            _finish(writer, checkpoint)
        finally:
            writer.close()
    return out


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def checkpoint(models: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.open(models("llama"))


def test_round_trip(tmp_path: Path, checkpoint: Checkpoint) -> None:
    artifact = Artifact.open(_write(tmp_path / "a", checkpoint))
    assert artifact.names() == NAMES
    for info, spec in LAYERS:
        assert artifact.entry(info.name).info == info
        assert artifact.entry(info.name).spec == spec
        assert artifact.linear(info.name).equals(LINEARS[info.name])
    assert artifact.entry("blocks.0.up") == LayerEntry(*LAYERS[1], 0.5, 0.25)
    assert artifact.entry("embed").loss_after is None
    assert {name: values.tolist() for name, values in artifact.overrides().items()} == {
        "norm.weight": [0, 1, 2, 3, 4],
        "norm.bias": BIAS.values().tolist(),
    }
    assert {n: (v.scale, v.codes.tolist()) for n, v in artifact.vectors().items()} == {
        "norm.bias": (BIAS.scale, BIAS.codes.tolist())
    }
    manifest = artifact.manifest
    assert manifest.source["digest"] == checkpoint.digest
    assert manifest.kept_float == (("pooler", "outside the blocks"),)
    assert manifest == Manifest.from_json(encode(manifest))
    with pytest.raises(ArtifactError, match="there is no quantized layer 'lm_head'"):
        artifact.linear("lm_head")


def test_side_files_are_copied_byte_for_byte_and_hashed(tmp_path: Path, checkpoint: Checkpoint) -> None:
    folder = _write(tmp_path / "a", checkpoint)
    for path in checkpoint.side_files():
        assert (folder / path).read_bytes() == (checkpoint.folder / path).read_bytes()
    listed = set(Artifact.open(folder).manifest.files)
    assert listed == _bytes(folder).keys() - {"manifest.json"}
    assert "tokenizer.json" in listed


@pytest.mark.parametrize("shard_bytes", [1 << 30, 6000, 1])
def test_bytes_do_not_depend_on_order_or_interruption(tmp_path: Path, checkpoint: Checkpoint, shard_bytes: int) -> None:
    first = _bytes(_write(tmp_path / "a", checkpoint, shard_bytes=shard_bytes))
    assert _bytes(_write(tmp_path / "b", checkpoint, NAMES[::-1], shard_bytes)) == first
    for pause in range(1, len(NAMES)):
        assert _bytes(_write(tmp_path / str(pause), checkpoint, NAMES, shard_bytes, pause)) == first


def test_a_layer_that_was_written_but_not_recorded_is_written_again(tmp_path: Path, checkpoint: Checkpoint) -> None:
    tmp_path.joinpath("a").mkdir()
    writer = ArtifactWriter(tmp_path / "a", LAYERS)
    writer.add("embed", LINEARS["embed"])
    writer.close()
    writer = ArtifactWriter(tmp_path / "a", LAYERS)
    assert writer.done == set()
    for name in NAMES:
        writer.add(name, LINEARS[name])
    _add_overrides(writer)
    _finish(writer, checkpoint)
    assert _bytes(tmp_path / "a") == _bytes(_write(tmp_path / "b", checkpoint))


def test_finishing_again_after_a_kill_gives_the_same_bytes(tmp_path: Path, checkpoint: Checkpoint) -> None:
    folder = _write(tmp_path / "a", checkpoint)
    before = _bytes(folder)
    (folder / "manifest.json").unlink()  # killed after the overrides, before the manifest
    writer = ArtifactWriter(folder, LAYERS, NAMES)
    _add_overrides(writer)
    _finish(writer, checkpoint)
    assert _bytes(folder) == before


def test_shards_keep_below_their_limit_and_together_hold_every_layer(tmp_path: Path, checkpoint: Checkpoint) -> None:
    folder = _write(tmp_path / "a", checkpoint, shard_bytes=6000)
    shards = sorted(path.name for path in folder.glob("quantized-*"))
    count = len(shards)
    assert count > 1
    assert shards == [f"quantized-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert all((folder / name).stat().st_size < 6000 + 2000 for name in shards)  # 2000: more than any header here
    assert Artifact.open(folder).linear("blocks.1.down").equals(LINEARS["blocks.1.down"])


def test_bits_per_weight_are_those_of_the_schemes_and_files_spend_a_byte_on_a_zero_point(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    artifact = Artifact.open(_write(tmp_path / "a", checkpoint))
    weights = sum(info.in_features * info.out_features for info, _ in LAYERS)
    assert artifact.bits_per_weight == sum(linear.storage_bits for linear in LINEARS.values()) / weights
    files = sum(file.stat().st_size - 8 - _header(file) for file in (tmp_path / "a").glob("quantized-*"))
    wider = sum(linear.zero_points.size * (8 - linear.spec.bits) for linear in LINEARS.values()
                if linear.zero_points is not None)  # fmt: skip
    assert files == sum(artifact.entry(name).stored_bytes() for name in NAMES)
    assert 8 * files == artifact.bits_per_weight * weights + wider


def _header(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[:8], "little")


def test_an_artifact_without_quantized_layers_is_fine(tmp_path: Path, checkpoint: Checkpoint) -> None:
    with write_folder(tmp_path / "a") as folder:
        _finish_float(ArtifactWriter(folder, []), checkpoint)
    artifact = Artifact.open(tmp_path / "a")
    assert (artifact.names(), artifact.overrides(), artifact.bits_per_weight) == ([], {}, 0.0)


def _finish_float(writer: ArtifactWriter, checkpoint: Checkpoint) -> None:
    writer.finish(
        source=artifact_source(checkpoint), algorithm={"name": "float", "settings": {}}, calibration={}, versions={}
    )


def test_an_artifact_can_be_moved_and_read_through_the_hub_cache(tmp_path: Path, checkpoint: Checkpoint) -> None:
    _write(tmp_path / "a", checkpoint).rename(tmp_path / "moved")
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "rev", tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((tmp_path / "moved").iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert Artifact.open(snapshot).linear("embed").equals(LINEARS["embed"])


def test_without_hashes_everything_else_is_still_checked(tmp_path: Path, checkpoint: Checkpoint) -> None:
    folder = _write(tmp_path / "a", checkpoint)
    (shard,) = folder.glob("quantized-*")
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    assert Artifact.open(folder, check_hashes=False).names() == NAMES
    shard.write_bytes(raw[:-1])
    with pytest.raises(ArtifactError, match="incomplete or changed"):
        Artifact.open(folder, check_hashes=False)


def test_the_digest_changes_with_any_file(tmp_path: Path, checkpoint: Checkpoint) -> None:
    first = Artifact.open(_write(tmp_path / "a", checkpoint)).digest
    assert Artifact.open(_write(tmp_path / "b", checkpoint)).digest == first
    with write_folder(tmp_path / "c") as folder:
        _finish_float(ArtifactWriter(folder, []), checkpoint)
    assert Artifact.open(tmp_path / "c").digest != first


def test_the_worked_example_of_the_specification_is_what_gets_written(tmp_path: Path, checkpoint: Checkpoint) -> None:
    text = (Path(roundexport.formats.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
    dump = "".join(re.findall(r"^    [0-9a-f]{4}  ((?:[0-9a-f]{2} )+)", text, re.MULTILINE))
    entry = json.loads(re.findall(r'^    ({"info".*?null})$', text, re.MULTILINE | re.DOTALL)[0])

    spec = QuantSpec(4, 16, False)
    codes, scales = np.arange(16, dtype=np.uint8)[None], np.array([[-0.5]], np.float16)
    up = QuantizedLinear.from_unpacked(spec, codes, scales, np.array([[8]], np.uint8))
    with write_folder(tmp_path / "a") as folder:
        writer = ArtifactWriter(folder, [(LinearInfo("up", 16, 1), spec)])
        writer.add("up", up)
        _finish_float(writer, checkpoint)
    assert (tmp_path / "a" / "quantized-00001-of-00001.safetensors").read_bytes() == bytes.fromhex(dump)
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["layers"] == [entry]
    assert Artifact.open(tmp_path / "a").linear("up").dequantize()[0].tolist() == [(k - 8) * -0.5 for k in range(16)]


def test_the_specification_lists_exactly_the_keys_of_both_manifests() -> None:
    text = (Path(roundexport.formats.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
    for start, kind in (("### 3.2", Manifest), ("## 4.", PackageManifest)):
        section = text.split(start)[1].split("\n## ")[0]
        rows = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
        listed = {key for row in rows for key in re.findall(r"`([a-z_]+)`", row)}
        assert listed == {field.name for field in dataclasses.fields(kind)}


# --- what the writer refuses ---------------------------------------------------------------------------------------


def test_the_writer_refuses_layers_that_are_missing_unknown_or_different(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    writer = ArtifactWriter(tmp_path, LAYERS)
    with pytest.raises(ArtifactError, match="the layer 'other' was not announced"):
        writer.add("other", LINEARS["embed"])
    with pytest.raises(ArtifactError, match=r"blocks\.0\.up: announced as"):
        writer.add("blocks.0.up", LINEARS["blocks.1.up"])
    writer.add("embed", LINEARS["embed"])
    with pytest.raises(ArtifactError, match=r"5 layers were not added, the first is blocks\.0\.up"):
        _finish(writer, checkpoint)
    assert not (tmp_path / "manifest.json").exists()
    writer.close()


def test_the_writer_refuses_a_state_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="the layer gone is done but not asked for"):
        ArtifactWriter(tmp_path, LAYERS, ["gone"])
    with pytest.raises(ArtifactError, match="cannot be reopened: No such file"):
        ArtifactWriter(tmp_path, LAYERS, ["embed"])
    ArtifactWriter(tmp_path, LAYERS).close()
    other = [(LAYERS[0][0], QuantSpec(8, 16, True)), *LAYERS[1:]]
    with pytest.raises(ArtifactError, match="was begun with other tensors or is damaged"):
        ArtifactWriter(tmp_path, other, ["embed"])
    with pytest.raises(ArtifactError, match="two layers have the same name"):
        ArtifactWriter(tmp_path, [*LAYERS, LAYERS[0]])
    with pytest.raises(SpecError, match="x: group_size 32 does not divide K=40"):
        ArtifactWriter(tmp_path, [(LinearInfo("x", 40, 8), QuantSpec(4, 32))])


@pytest.mark.parametrize("call", ["os.posix_fallocate", "roundexport.storage.safetensors_writer._write_at", "os.fsync"])
def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(call, full)
    with pytest.raises(WontFitError, match="the disk is full: could not write"):
        _write(tmp_path / "a", checkpoint)
    assert list(tmp_path.iterdir()) == []
