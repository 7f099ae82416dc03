"""Families whose graphs have a shape of their own, run on both runtimes beside transformers: whole, cached, padded.

Export has compared each package with its model already (output_check.py); this compares with what `from_pretrained`
gives, at lengths beyond every window and every original length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_support import write_artifact

from roundexport.quant.spec import QuantSpec
from roundexport.runtime.embedding import Encoder
from roundexport.runtime.generation import Decoder
from roundexport.runtime.loading import load
from roundexport.targets.export import export

SMALL: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 3,
}  # fmt: skip
SHARED_KEYS = {
    "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 384, "hidden_size_per_layer_input": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
YARN = {**LINEAR, "rope_type": "yarn", "original_max_position_embeddings": 32}
EXPERTS = {
    "num_hidden_layers": 1, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "norm_topk_prob": True,
}  # fmt: skip
TEXT_PART = {
    "text_config": {
        **SMALL, "num_hidden_layers": 1, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    },
    "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64},
}  # fmt: skip
SINKS = {
    "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
    "sliding_window": 24, "layer_types": ["sliding_attention"], "intermediate_size": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
LATENT = {
    "num_hidden_layers": 1, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32, "v_head_dim": 32, "head_dim": 16, "first_k_dense_replace": 0, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}  # fmt: skip
SHORT_CONVOLUTION = {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"], "block_multiple_of": 32}
DELTA_RULE = {
    "num_key_value_heads": 2, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
MAMBA = {
    "num_hidden_layers": 1, "num_key_value_heads": 2, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 16, "mamba_rms_norm": True,
}  # fmt: skip
ALONE = {"num_hidden_layers": 1, "num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 8, "chunk_size": 16}
HALVED = {"num_hidden_layers": 2, "rescale_every": 1, "context_length": 128}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "blocks that share their weights": ("AlbertConfig", "AlbertModel", {"embedding_size": 32, "type_vocab_size": 2}),
    "experts, one shared": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**EXPERTS, "shared_expert_intermediate_size": 64},
    ),
    "gated delta rule": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", DELTA_RULE),
    "Mamba-2 beside attention": ("FalconH1Config", "FalconH1ForCausalLM", MAMBA),
    "Mamba-2, no attention at all": ("Mamba2Config", "Mamba2ForCausalLM", ALONE),
    "averages that fade": ("RwkvConfig", "RwkvForCausalLM", HALVED),
    "short convolution": ("Lfm2Config", "Lfm2ForCausalLM", SHORT_CONVOLUTION),
    "sinks, clamped experts with biases": ("GptOssConfig", "GptOssForCausalLM", SINKS),
    "latent attention, complex rotary": ("DeepseekV2Config", "DeepseekV2ForCausalLM", LATENT),
    "layers that share keys": ("Gemma4TextConfig", "Gemma4ForCausalLM", SHARED_KEYS),
    "linear rotary": ("LlamaConfig", "LlamaForCausalLM", {"num_hidden_layers": 1, "rope_parameters": LINEAR}),
    "text beside images": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", TEXT_PART),
    "positions added to scores": ("BloomConfig", "BloomForCausalLM", {"n_layer": 1, "n_head": 4}),
    "yarn": ("LlamaConfig", "LlamaForCausalLM", {"num_hidden_layers": 1, "rope_parameters": YARN}),
}


def build(name: str, folder: Path) -> torch.nn.Module:
    import transformers

    config_name, model_name, values = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**{**SMALL, **values})).eval()
    with torch.no_grad():  # large enough for logits that are not flat
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.std() > 0:
                parameter.mul_(0.25 / parameter.std())
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return model  # type: ignore[no-any-return]


def apart(found: np.ndarray, expected: torch.Tensor) -> float:
    return float(np.abs(found - expected.numpy()).max() / expected.std())


@torch.no_grad()
@pytest.mark.parametrize("target", ["onnx", "openvino"])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_transformers_answer(name: str, target: str, tmp_path: Path) -> None:
    model = build(name, tmp_path / "m")
    export(tmp_path / "m", tmp_path / "p", to=target, progress=False)
    package, ids = load(tmp_path / "p", precise=True), np.random.default_rng(1).integers(4, 384, (2, 60))
    if isinstance(package, Encoder):
        mask, types = np.ones_like(ids), np.random.default_rng(2).integers(0, 2, ids.shape)
        mask[1, 40:] = 0
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        expected = model(**{name: torch.tensor(values) for name, values in feed.items()}).last_hidden_state
        assert apart(package.hidden(feed)[mask == 1], expected[torch.tensor(mask) == 1]) < 1e-4
        return
    assert isinstance(package, Decoder)
    expected = model(torch.tensor(ids)).logits
    assert apart(package.logits(ids), expected) < 2e-4
    with package.start(rows=2) as session:
        numbers = session.add(2)
        parts = [session.extend({number: row[:20].tolist() for number, row in zip(numbers, ids, strict=True)}).copy()]
        for place in range(20, 60):
            new = {number: [int(row[place])] for number, row in zip(numbers, ids, strict=True)}
            parts.append(session.extend(new).copy())
    assert apart(np.stack(parts, 1), expected[:, 19:]) < 2e-4


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_integers_of_a_shared_block_are_stored_once(target: str, tmp_path: Path) -> None:
    build("blocks that share their weights", tmp_path / "m")
    write_artifact(tmp_path / "m", tmp_path / "a", QuantSpec(8, 32), None)
    report = export(tmp_path / "a", tmp_path / "p", to=target, progress=False)
    assert report.outputs is not None and report.outputs.difference < 1e-4
    assert len(report.exported) == len(set(report.exported)) > 5
