"""Many families by name: each is captured, or refused with its true reason, from its config alone and two layers.

A row is (config class, model class, what the config says, what is expected): a number of attention layers for a
capture, else words of the refusal.  Adding a family is adding a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from roundexport.errors import UnsupportedError
from roundexport.graph.capture import capture
from roundexport.model.checkpoint import Checkpoint

COMMON: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 3, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128,
}  # fmt: skip
WINDOWS = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA = {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 64}
LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4, "head_dim": None, "first_k_dense_replace": 2, "n_routed_experts": 4,
}  # fmt: skip
PER_LAYER = {"vocab_size_per_layer_input": 384, "hidden_size_per_layer_input": 16}
SHARED_KV = {
    **PER_LAYER, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
LLAMA4 = {"moe_layers": [], "intermediate_size_mlp": 128, "attention_chunk_size": 32, "no_rope_layers": [1, 0]}

SMALL_TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}

Row = tuple[str, str, dict[str, Any], int | str]
FAST: dict[str, Row] = {
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}, 2),
    "gemma4, shared keys": ("Gemma4TextConfig", "Gemma4ForCausalLM", SHARED_KV, 4),
    "diffllama attends twice": ("DiffLlamaConfig", "DiffLlamaForCausalLM", {}, 4),
    "albert shares a block": ("AlbertConfig", "AlbertModel", {"embedding_size": 64}, 2),
    "qwen3 embedder": ("Qwen3Config", "Qwen3Model", {}, 2),
    "splinter says nothing of causality": ("SplinterConfig", "SplinterModel", {}, 2),
    "llama4 in chunks": ("Llama4TextConfig", "Llama4ForCausalLM", LLAMA4, 2),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4}, 2),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32}, 1),
    "qwen3.5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", LINEAR, 1),
    "falcon-h1": ("FalconH1Config", "FalconH1ForCausalLM", MAMBA, 2),
    "mamba, first version": ("MambaConfig", "MambaForCausalLM", {}, 0),
    "lightning attention": (
        "MiniMaxConfig",
        "MiniMaxForCausalLM",
        {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"]},
        1,
    ),
    "deberta with talking heads": (
        "DebertaConfig",
        "DebertaModel",
        {"relative_attention": True, "talking_head": True},
        "mixes its heads' scores",
    ),
    "rwkv": ("RwkvConfig", "RwkvForCausalLM", {}, 0),
    "paligemma": (
        "PaliGemmaConfig",
        "PaliGemmaForConditionalGeneration",
        {"text_config": {**COMMON, "model_type": "gemma"}, "vision_config": SMALL_TOWER},
        "attention 0 reads a prompt both ways",
    ),
    "wav2vec2": (
        "Wav2Vec2Config",
        "Wav2Vec2ForCTC",
        {"conv_dim": [8] * 7, "num_conv_pos_embedding_groups": 4},
        2,
    ),
    "doge forgets keys": ("DogeConfig", "DogeForCausalLM", {"keep_window_size": 64}, "exceed keep_window_size 64"),
    "vit": (
        "ViTConfig",
        "ViTModel",
        {"image_size": 32, "patch_size": 8, "vocab_size": 64},
        "ViTModel takes pixel_values",
    ),
}
MORE: dict[str, Row] = {
    "mistral, windows": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 24}, 2),
    "ministral, mixed": ("MinistralConfig", "MinistralForCausalLM", WINDOWS, 2),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**WINDOWS, "query_pre_attn_scalar": 32}, 2),
    "olmo3": ("Olmo3Config", "Olmo3ForCausalLM", WINDOWS, 2),
    "cohere2": ("Cohere2Config", "Cohere2ForCausalLM", {**WINDOWS, "logit_scale": 0.5}, 2),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {"attention_multiplier": 0.2}, 2),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {}, 2),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}, 2),
    "gpt_bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", {}, 2),
    "deepseek_v3, dense": ("DeepseekV3Config", "DeepseekV3ForCausalLM", LATENT, 2),
    "distilbert": ("DistilBertConfig", "DistilBertModel", {"dim": 64, "hidden_dim": 128, "n_heads": 4}, 2),
    "electra": ("ElectraConfig", "ElectraModel", {"embedding_size": 32}, 2),
    "llama, bidirectional": ("LlamaConfig", "LlamaModel", {"is_causal": False}, 2),
    "gemma3, bidirectional": (
        "Gemma3TextConfig", "Gemma3TextModel", {**WINDOWS, "use_bidirectional_attention": True}, 2,
    ),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {"num_local_experts": 4},  2),
    "ctrl": ("CTRLConfig", "CTRLLMHeadModel", {"dff": 128}, 2),
    "clip": ("CLIPConfig", "CLIPModel", {"text_config": SMALL_TOWER, "vision_config": SMALL_TOWER}, 2),
    "clip, text": ("CLIPTextConfig", "CLIPTextModel", {}, 2),
}  # fmt: skip


def check_row(row: Row, folder: Path) -> None:
    import torch
    import transformers

    config_name, model_name, values, expected = row
    torch.manual_seed(0)
    given = {**COMMON, **values}
    config = getattr(transformers, config_name)(**given)
    getattr(transformers, model_name)(config).save_pretrained(folder)
    if isinstance(expected, int):
        checkpoint = Checkpoint.open(folder)
        got = capture(checkpoint)
        assert min(1, expected) <= len(capture(checkpoint, whole=False).attentions) <= expected
        assert len(got.attentions) == expected
        assert [info.index for info in got.attentions] == list(range(expected))
        decoder_like = checkpoint.task == "generate" or model_name in ("Qwen3Model", "CLIPTextModel")
        assert all(info.causal == decoder_like for info in got.attentions)
    else:
        with pytest.raises(UnsupportedError, match=expected):
            capture(Checkpoint.open(folder))


@pytest.mark.parametrize("name", FAST)
def test_family(name: str, tmp_path: Path) -> None:
    check_row(FAST[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_families(name: str, tmp_path: Path) -> None:
    check_row(MORE[name], tmp_path)


def test_a_mask_rule_is_held_against_what_the_layer_tells() -> None:
    from transformers import masking_utils as masks

    from roundexport.graph.attention import follows

    assert follows(masks.causal_mask_function, causal=True, window=-1)
    assert follows(masks.sliding_window_causal_mask_function(24), causal=True, window=24)
    assert follows(masks.bidirectional_mask_function, causal=False, window=-1)
    assert follows(masks.sliding_window_bidirectional_mask_function(8), causal=False, window=9)
    assert not follows(masks.causal_mask_function, causal=False, window=-1)
    assert not follows(masks.causal_mask_function, causal=True, window=24)
    assert not follows(masks.sliding_window_causal_mask_function(24), causal=True, window=-1)
    assert not follows(masks.sliding_window_causal_mask_function(24), causal=True, window=25)
    import torch

    chunks = masks.chunked_causal_mask_function(32, torch.zeros(1, dtype=torch.long))
    assert not follows(chunks, causal=True, window=-1)
    assert not follows(chunks, causal=True, window=32)
