"""Shards, links and caches are read; every kind of broken folder is refused with its reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_tools import assert_holds_the_model
from safetensors.numpy import load_file, save_file

from roundexport.errors import CheckpointError, UnsupportedError
from roundexport.model.checkpoint import Checkpoint


@pytest.fixture
def folder(models: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a model to break."""
    return Path(shutil.copytree(models("llama"), tmp_path / "model"))


def _split(folder: Path) -> dict[str, Any]:
    """Turn the single weight file into two shards with an index; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def _refused(folder: Path | str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert str(folder) in str(caught.value)


def test_shards_are_one_model(folder: Path) -> None:
    whole = Checkpoint.open(folder)
    values = {name: whole.float32(name) for name in whole.names()}
    _split(folder)
    sharded = Checkpoint.open(folder)
    assert_holds_the_model(sharded)
    assert all(np.array_equal(sharded.float32(name), values[name]) for name in values)
    assert len(sharded.files()) == 4  # config, index, two shards


def test_a_missing_shard_is_named(folder: Path) -> None:
    _split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    _refused(folder, r"1 of 2 weight files are missing, the first is model-00002-of-00002\.safetensors; fetch it again")


def test_a_truncated_shard_is_named(folder: Path) -> None:
    _split(folder)
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    _refused(folder, r"model-00001-of-00002\.safetensors: .* the file is truncated")


def test_a_git_lfs_pointer_is_no_weight_file(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    _refused(folder, r"model\.safetensors: .*truncated or no safetensors")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "weights.bin"])
def test_an_index_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    index = _split(folder)
    index["weight_map"]["model.norm.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _refused(folder, f"the weight file {name!r} is refused; it must lie in the folder")


def test_an_index_that_does_not_fit_its_shards_is_refused(folder: Path) -> None:
    index = _split(folder)
    index["weight_map"]["model.new.weight"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _refused(folder, r"model\.new\.weight should be in model-00001-of-00002\.safetensors but is not")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map_is_refused(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    _refused(folder, "weight_map must map every tensor to a file")


def test_the_same_tensor_in_two_shards_is_refused(folder: Path) -> None:
    index = _split(folder)
    first, second = sorted(set(index["weight_map"].values()))
    save_file(load_file(folder / second) | load_file(folder / first), folder / second)
    _refused(folder, f"is in {first} and in {second}")


def test_a_weight_file_that_links_out_of_the_folder_is_refused(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "w.safetensors")
    (folder / "model.safetensors").symlink_to("../w.safetensors")
    _refused(folder, r"model\.safetensors is a link that leaves the folder")


def test_a_snapshot_of_the_hub_cache_is_read_through_its_links(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "rev", tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    digest = Checkpoint.open(folder).digest
    for path in folder.iterdir():
        path.rename(blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    checkpoint = Checkpoint.open(snapshot)
    assert checkpoint.digest == digest
    assert "tokenizer.json" in checkpoint.copy_side_files(tmp_path / "out")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"])
def test_pickle_weights_are_refused_with_the_way_out(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    _refused(folder, f"the weights are a pickle .{name}.*never read.*save_pretrained")
    _refused(folder / name, "is a pickle file, which is never read; give the model's folder")


def test_pickles_beside_safetensors_do_not_matter(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (folder / "optimizer.pt").write_bytes(b"x")
    assert Checkpoint.open(folder).load_model().config.model_type == "llama"


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "empty", "is no model folder: it has no config.json")
    (folder / "model.safetensors").unlink()
    _refused(folder, r"holds no weights: neither model\.safetensors nor model\.safetensors\.index\.json")
    _refused(folder / "config.json", "is a file; give the model's folder")


@pytest.mark.parametrize("text", ["{", "[]", '{"a":1,"a":2}', ""])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    _refused(folder, r"config\.json: ")


@pytest.mark.parametrize("architectures", [None, [], "LlamaForCausalLM", [1]])
def test_a_config_without_architecture_is_refused(folder: Path, architectures: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    _refused(folder, "`architectures` names no model class")


def test_a_checkpoint_that_says_quantized_and_holds_floats_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    _refused(folder, "says quantized, but no layer has a qweight")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"is_encoder_decoder": True}, "has an encoder and a decoder and does not answer in tokens"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "is not supported; decoders and encoders of text, "),
    ],
)
def test_what_has_a_decoder_beside_other_things_is_refused(folder: Path, change: dict[str, Any], words: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UnsupportedError, match=words):
        Checkpoint.open(folder)


@pytest.mark.parametrize("model", ["nowhere", "./a/b", "/nowhere/at/all", "a/b/c", "", "~/model"])
def test_a_path_that_does_not_exist_is_told(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _refused(model, "there is no such folder, and it is no Hugging Face id|is no model folder")


def test_a_hub_id_that_cannot_be_fetched_is_told() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    _refused(
        "no-such-owner/no-such-model", "there is no such folder, and it could not be fetched from the Hugging Face"
    )


def test_weights_that_leave_parameters_unset_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lack 1 parameters, the first is model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        Checkpoint.open(folder).load_model()


def test_remote_code_is_not_run_unasked(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto_map}))
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(CheckpointError, match=r"transformers cannot load the model: (?s:.*)trust_remote_code"):
        Checkpoint.open(folder).load_model()


def test_a_tensor_that_is_not_there_is_told(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no tensor model\.nothing in the weights"):
        Checkpoint.open(folder).float32("model.nothing")


def test_reading_a_tensor_costs_no_more_memory_than_that_tensor(tmp_path: Path, folder: Path) -> None:
    """A 256 MiB file with sixteen 16 MiB tensors, each read and dropped: far below the file in peak memory."""
    tensors: dict[str, Any] = {f"model.t{i}.weight": np.full(4 << 20, i, np.float32) for i in range(16)}
    tensors["lm_head.weight"] = np.zeros((1, 1), np.float32)
    save_file(tensors, folder / "model.safetensors")
    code = (
        "import resource, sys; from roundexport.model.checkpoint import Checkpoint\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "c = Checkpoint.open(sys.argv[1]); start = peak()\n"
        "assert all(c.float32(f'model.t{i}.weight').sum() == (4 << 20) * i for i in range(16))\n"
        "c.digest; print(peak() - start)"
    )
    grown = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True).stdout
    # two tensors at most (the old is dropped when the new is bound), 16 MiB of conversion buffer, and 16 MiB of slack
    assert int(grown) < 2 * 16 + 16 + 16
