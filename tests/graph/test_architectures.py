"""Families of `graph/architectures/`, and tables with a forward of their own: the captured graph beside transformers.

The graph is run in plain torch (captured_reference.py), so a row costs a second; what the targets make of a bias is in
tests/targets/test_families_run.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from captured_reference import Reference
from checkpoint_tools import spread_weights

from roundexport import plugins
from roundexport.errors import UnsupportedError
from roundexport.graph.architectures.interface import Architecture
from roundexport.graph.capture import capture
from roundexport.model.checkpoint import Checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 3, "n_embd": 64, "n_layer": 2,
    "n_head": 4, "n_positions": 128, "d_model": 64, "n_heads": 4, "n_layers": 2,
}  # fmt: skip
SIX_HEADS = {"hidden_size": 96, "num_attention_heads": 6}  # not a power of two, which ALiBi's slopes depend on
ALIBI = {"alibi": True, "multi_query": False, "parallel_attn": False}
LOCAL = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 8}
IN_CHUNKS = {  # a layer of chunks that turns and norms, and one that scales by place; both change within 24 tokens
    "moe_layers": [], "intermediate_size_mlp": 128, "attention_chunk_size": 8, "no_rope_layers": [1, 0], "head_dim": 16,
    "num_key_value_heads": 2, "floor_scale": 4,
}  # fmt: skip
SPARSE = {
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size_per_layer_input": 384, "hidden_size_per_layer_input": 16,
    "laurel_rank": 8, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.95, 0.0], "altup_num_inputs": 2,
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8,
}  # fmt: skip
DISENTANGLED = {
    "relative_attention": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": "p2c|c2p", "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip
# family -> (words of transformers' classes, head, what the config says); its file: the key's first word
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bloom": ("Bloom", "ForCausalLM", {}),
    "codegen": ("CodeGen", "ForCausalLM", {"rotary_dim": 16, "n_ctx": 128}),
    "deberta": ("Deberta", "Model", {**DISENTANGLED, "pos_att_type": "c2p|p2c"}),
    "deberta, fewer distances": ("Deberta", "Model", {**DISENTANGLED, "max_relative_positions": 8}),
    "deberta_v2": ("DebertaV2", "Model", DISENTANGLED),
    "deberta_v2 without sharing": ("DebertaV2", "Model", {**DISENTANGLED, "share_att_key": False}),
    "deberta_v2, content alone": ("DebertaV2", "Model", {"type_vocab_size": 0}),
    "doge": ("Doge", "ForCausalLM", {"num_key_value_heads": 2, "head_dim": 16}),
    "doge, odd width": ("Doge", "ForCausalLM", {"num_key_value_heads": 2, "head_dim": 20}),
    "falcon, one pair for all": ("Falcon", "ForCausalLM", {"multi_query": True}),
    "falcon, groups": ("Falcon", "ForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, alibi": ("Falcon", "ForCausalLM", {**SIX_HEADS, **ALIBI}),
    "gpt_neo": ("GPTNeo", "ForCausalLM", LOCAL),
    "gptj": ("GPTJ", "ForCausalLM", {"rotary_dim": 16}),
    "gemma3n": ("Gemma3n", "ForCausalLM", SPARSE),
    "llama4": ("Llama4", "ForCausalLM", IN_CHUNKS),
    "mpnet": ("MPNet", "Model", {}),
    "mpt": ("Mpt", "ForCausalLM", {"max_seq_len": 128}),
    "openai": ("OpenAIGPT", "LMHeadModel", {}),
    "xglm": ("XGLM", "ForCausalLM", {"num_layers": 2, "attention_heads": 4, "ffn_dim": 128}),
}  # fmt: skip
LIGHTNING = {
    "num_key_value_heads": 2, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "block_size": 8,
    "num_local_experts": 4,
}  # fmt: skip
GRIFFIN = {
    "num_key_value_heads": 1, "head_dim": 16, "lru_width": 64, "attention_window_size": 8,
    "block_types": ["recurrent", "attention"],
}  # fmt: skip
JAMBA = {"num_key_value_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
         "num_experts": 4, "expert_layer_period": 2, "expert_layer_offset": 0}  # fmt: skip
STATES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mamba": ("Mamba", "ForCausalLM", {"state_size": 8}),
    "falcon_mamba": ("FalconMamba", "ForCausalLM", {"state_size": 8}),
    "jamba": ("Jamba", "ForCausalLM", JAMBA),
    "minimax": ("MiniMax", "ForCausalLM", LIGHTNING),
    "recurrent_gemma": ("RecurrentGemma", "ForCausalLM", GRIFFIN),
    "rwkv": ("Rwkv", "ForCausalLM", {"rescale_every": 1}),
}
ATTENTIONS = {"mamba": 0, "falcon_mamba": 0, "jamba": 1, "minimax": 1, "recurrent_gemma": 1, "rwkv": 0}  # of others 2
TABLES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "opt": ("OPT", "ForCausalLM", {"word_embed_proj_dim": 64, "ffn_dim": 128}),
    "opt, projected": ("OPT", "ForCausalLM", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
}  # fmt: skip


def build(row: tuple[str, str, dict[str, Any]], folder: Path) -> torch.nn.Module:
    import transformers

    name, head, values = row
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    config = config_class(**{**SIZES, **values})
    model = getattr(transformers, f"{name}{head}")(config).eval()
    spread_weights(model)
    model.save_pretrained(folder)
    return model  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, *STATES, *TABLES])
def test_the_graph_gives_what_transformers_gives(family: str, tmp_path: Path) -> None:
    model = build({**FAMILIES, **STATES, **TABLES}[family], tmp_path)
    ids = torch.arange(4, 76).view(3, 24)
    checkpoint = Checkpoint.open(tmp_path)
    got = capture(checkpoint)
    assert len(got.attentions) == ATTENTIONS.get(family, 2)
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(24).expand(3, 24),
        "token_type_ids": torch.zeros_like(ids),
    }  # fmt: skip
    found = Reference(got, checkpoint).run(*(inputs[name] for name in got.inputs))
    found = found[0] if isinstance(found, tuple) else found
    expected = model(ids)[0]
    assert float((found - expected).abs().max() / expected.std()) < 1e-4


def test_keys_of_groups_are_cached_once(tmp_path: Path) -> None:
    build(FAMILIES["falcon, groups"], tmp_path)
    got = capture(Checkpoint.open(tmp_path))
    assert [info.num_kv_heads for info in got.attentions] == [2, 2]
    assert len(got.linears) == 9 and len(got.rope_table_of) == 4


def test_every_family_has_a_row() -> None:
    tried = {name.replace(",", " ").split()[0] for name in [*FAMILIES, *STATES]}
    images = {"idefics3", "smolvlm", "qwen3_vl"}  # tests/targets/test_vision_parts.py, tests/runtime/test_qwen_vl.py
    pairs = {"mt5", "t5", "umt5", "whisper"}  # tests/model/test_encoder_decoder.py, tests/targets/test_pair_packages.py
    assert set(plugins.names("architectures")) == tried | images | pairs


def test_a_class_without_the_method_is_told() -> None:
    architecture = Architecture({"Linear.attend": lambda *_: None})
    with (
        pytest.raises(UnsupportedError, match="Linear has no method attend"),
        architecture.routed(torch.nn.Linear(1, 1), None),
    ):  # type: ignore[arg-type]
        raise AssertionError
