"""config.json and generation_config.json: nonsense is refused at once, by key, value and file; tensors must fit it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from roundexport.errors import ArtifactError, CheckpointError, UnsupportedError
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.model_config import hidden_width, task_of
from roundexport.model.skeleton import build_skeleton
from roundexport.model.special_tokens import special_tokens
from roundexport.model.tensor_fit import check_overrides


@pytest.fixture
def folder(models: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a model to break."""
    return Path(shutil.copytree(models("llama"), tmp_path / "model"))


def _change(folder: Path, file: str = "config.json", **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


NONSENSE = {
    "vocab_size": ["4096", 0, 1.5, True, [384]],
    "hidden_size": [[256], "64", 0, -1, 10**9],
    "num_attention_heads": [0, "4"],
    "num_hidden_layers": [10**7, 1, 3, 0],
    "max_position_embeddings": [-3, 10**12],
    "dtype": ["evil", 3],
    "rms_norm_eps": ["x", -1],
    "rope_parameters": [[1, 2], "x"],
    "tie_word_embeddings": ["yes", 1],
    "model_type": [3],
    "head_dim": [10**9],
    "bos_token_id": [10**6, "0", 1.5, True, [0, 1]],
    "eos_token_id": [999_999, [0, 999_999], ["0"]],
    "pad_token_id": [384],
    "quantization_config": [{"quant_method": "gptq", "bits": 4}],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in NONSENSE.items() for value in values])
def test_a_value_without_sense_is_refused_by_name(folder: Path, key: str, value: Any) -> None:
    (folder / "generation_config.json").unlink()  # whose token ids would count first
    _change(folder, **{key: value})
    named = (
        "GPTQ|no layer has a qweight"
        if key == "quantization_config"
        else f"{key}.*config.json|config.json: {key} must be"
    )
    with pytest.raises(CheckpointError, match=named):
        Checkpoint.open(folder)


def test_a_nested_quantization_config_is_seen_and_null_is_none(folder: Path) -> None:
    _change(folder, quantization_config=None)
    Checkpoint.open(folder)
    _change(folder, text_config={"quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(CheckpointError, match="no layer has a qweight"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"eos_token_id": "</s>"}', '{"bos_token_id": 1e3}'])
def test_a_generation_config_of_rubbish_is_refused(folder: Path, text: str) -> None:
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 5}, {}, (None, (5,), None)),
        ({"eos_token_id": 5}, {"eos_token_id": [7, 5]}, (None, (7, 5), None)),
        ({"eos_token_id": 5}, {"eos_token_id": [0]}, (None, (0,), None)),
        ({"eos_token_id": 5}, {"eos_token_id": None}, (None, (5,), None)),
        ({"eos_token_id": 5}, {"eos_token_id": []}, (None, (), None)),
        ({"eos_token_id": None}, {}, (None, (), None)),
        ({"bos_token_id": [1], "pad_token_id": -1}, {}, (1, (), None)),
        ({"bos_token_id": 1, "eos_token_id": 2}, {"pad_token_id": 2}, (1, (2,), 2)),
    ],
)
def test_special_tokens(config: dict[str, Any], generation: dict[str, Any], expected: tuple[Any, ...]) -> None:
    found = special_tokens({"vocab_size": 10, **config}, generation)
    assert (found["bos"], found["eos"], found["pad"]) == expected


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("model.layers.0.self_attn.q_proj.scale2", (64,), "hold 1 tensors that LlamaForCausalLM does not take"),
        (
            "model.layers.1.mlp.up_proj.weight",
            (),
            r"mlp\.up_proj\.weight is \[\] in the weights, but config.json makes",
        ),
        ("model.layers.1.mlp.up_proj.weight", (64, 64), r"is \[64, 64\] in the weights, but config.json makes"),
    ],
)
def test_tensors_that_the_model_does_not_take_are_refused(
    folder: Path, name: str, shape: tuple[int, ...], words: str
) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: np.ones(shape, np.float32)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        build_skeleton(Checkpoint.open(folder))
    with pytest.raises(CheckpointError):
        Checkpoint.open(folder).load_model()


def test_harmless_leftovers_pass(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    build_skeleton(Checkpoint.open(folder))
    Checkpoint.open(folder).load_model()


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("model.layers.9.input_layernorm.weight", np.ones(64), "which LlamaForCausalLM does not have"),
        ("model.norm.weight", np.ones(32), r"with \[32\], where the model has \[64\]"),
        ("model.norm.weight", np.full(64, np.nan), "not finite"),
    ],
)
def test_overrides_of_another_model_are_refused(folder: Path, name: str, values: Any, words: str) -> None:
    skeleton = build_skeleton(Checkpoint.open(folder))
    check_overrides(skeleton, {"model.norm.weight": np.ones(64, np.float32)})
    with pytest.raises(ArtifactError, match=words):
        check_overrides(skeleton, {name: values.astype(np.float32)})


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("BertForMultipleChoice", "multiple choice"),
        ("BertForNextSentencePrediction", "next sentence prediction"),
        ("GPT2DoubleHeadsModel", "double heads"),
    ],
)
def test_a_head_that_would_be_lost_is_refused(tmp_path: Path, architecture: str, kind: str) -> None:
    config = {"architectures": [architecture]}
    with pytest.raises(UnsupportedError, match=f"{architecture} has a head for {kind}, which is not exported"):
        task_of(config, tmp_path)
    (tmp_path / "modules.json").write_text("[]")
    assert task_of(config, tmp_path) == "embed"


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertForSequenceClassification", "classify"),
        ("Qwen3ForSequenceClassification", "classify"),
        ("ModernBertForTokenClassification", "tag"),
        ("RobertaForMaskedLM", "fill"),
        ("BertForQuestionAnswering", "answer"),
        ("GPT2LMHeadModel", "generate"),
    ],
)
def test_a_head_decides_the_task_but_where_vectors_are_wanted(tmp_path: Path, architecture: str, task: str) -> None:
    config = {"architectures": [architecture]}
    assert task_of(config, tmp_path) == task
    (tmp_path / "modules.json").write_text("[]")
    assert task_of(config, tmp_path) == "embed"
    (tmp_path / "config_sentence_transformers.json").write_text('{"model_type": "CrossEncoder"}')
    assert task_of(config, tmp_path) == task


SOUNDS = (
    "Wav2Vec2",
    "Hubert",
    "WavLM",
    "UniSpeech",
    "SEW",
    "Data2VecAudio",
    "Wav2Vec2Bert",
    "ASTransformer",
    "Parakeet",
)
OF_FEATURES = ("Wav2Vec2Bert", "ASTransformer", "Parakeet")


@pytest.mark.parametrize("family", SOUNDS)
def test_encoders_of_sounds_are_refused_but_those_that_write_letters(tmp_path: Path, family: str) -> None:
    """The advice to save the encoder alone would lead to another refusal."""
    kinds = {"ASTransformer": "ASTConfig", "Parakeet": "ParakeetCTCConfig"}
    config = getattr(transformers, kinds.get(family, f"{family}Config"))().to_dict()
    for ending in ("Model", "ForCTC", "ForSequenceClassification"):
        named = {**config, "architectures": [family + ending]}
        if ending == "ForCTC" and family not in OF_FEATURES:
            assert task_of(named, tmp_path) == "ctc"
            continue
        with pytest.raises(UnsupportedError, match=r"reads sounds;.*Wav2Vec2ForCTC.*Whisper"):
            task_of(named, tmp_path)


def test_what_reads_no_sounds_is_not_taken_for_it(tmp_path: Path) -> None:
    for name in ("Bert", "Llama", "ViT", "Lfm2", "Mamba"):
        kind = getattr(transformers, f"{name}Config")
        assert task_of({**kind().to_dict(), "architectures": [f"{name}Model"]}, tmp_path).startswith("embed")


@pytest.mark.parametrize("name", ["BertModel", "LlamaModel", "T5EncoderModel", "NomicBertModel"])
def test_models_without_a_head_embed(tmp_path: Path, name: str) -> None:
    assert task_of({"architectures": [name]}, tmp_path) == "embed"


@pytest.mark.parametrize(("config", "width"), [({"hidden_size": 576}, 576), ({"n_embd": 768}, 768), ({}, 0)])
def test_width_of_hidden_states_by_either_name(config: dict[str, Any], width: int) -> None:
    assert hidden_width(config) == width
