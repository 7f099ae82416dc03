"""Files that clients need beside the graph: `genai_config.json` for onnxruntime-genai.

`search.max_length` sizes the KV cache, which onnxruntime-genai allocates at once: it is cut to what fits in 512 MiB of
float32 keys and values; a caller who wants more sets max_length up to `context_length`.
Source: config.cpp of onnxruntime-genai 0.18 and the files that its own builder writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roundexport.formats.package import Tokens
from roundexport.kernels.native.library import IN_PACKAGE
from roundexport.types import EMBEDS, KvLayer

from .settings import MODEL_FILE, ONNXRUNTIME, OnnxSettings

# Types that onnxruntime-genai 0.18 treats as plain decoders; anything else goes by the generic name.
_PLAIN_TYPES = frozenset(
    "ernie4_5 gemma gemma2 gemma3_text granite llama mistral nemotron olmo phi qwen2 qwen3 smollm3".split()
)
_CACHE_BYTES = 512 << 20


def write_genai_config(
    out: Path,
    model_type: str,
    special: Tokens,
    kv: tuple[KvLayer, ...],
    inputs: tuple[str, ...],
    sizes: dict[str, int],
    settings: OnnxSettings,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write genai_config.json.

    Args:
        out: package folder.
        model_type: ``model_type`` of the source's config.
        special: special token ids.
        kv: the attention layers; all alike, as onnxruntime-genai sizes one cache for all.
        inputs: input names of the graph.
        sizes: ``vocab_size``, ``hidden_size``, ``num_attention_heads``, ``max_context``.
        settings: of the package.  A standard graph gives a longer cache at every step and shares no buffer; one with
            roundexport's own operator needs its library, which the user puts into the folder (kernels/native/).
        more: further entries of the model, of one that reads pictures (vision_client.py); its type is the library's.
    """
    per_token = sum(2 * 4 * layer["num_kv_heads"] * layer["head_dim"] for layer in kv)
    eos = list(special["eos"])
    pad = special["pad"] if special["pad"] is not None else (eos[0] if eos else 0)
    names = [name for name in ("input_ids", EMBEDS, "attention_mask", "position_ids") if name in inputs]
    session: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    decoder: dict[str, Any] = {
        "session_options": {**session, "custom_ops_library": IN_PACKAGE} if settings.kernels else session,
        "filename": MODEL_FILE,
        "head_size": kv[0]["head_dim"],
        "hidden_size": sizes["hidden_size"],
        "inputs": {
            **dict(zip(names, names, strict=True)),
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": sizes["num_attention_heads"],
        "num_hidden_layers": len(kv),
        "num_key_value_heads": kv[0]["num_kv_heads"],
    }
    model = {
        "bos_token_id": special["bos"] if special["bos"] is not None else pad,
        "context_length": sizes["max_context"],
        "decoder": decoder,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": pad,
        "type": model_type if more or model_type in _PLAIN_TYPES else "decoder",
        "vocab_size": sizes["vocab_size"],
        **(more or {}),
    }
    max_length = max(min(sizes["max_context"], _CACHE_BYTES // per_token // 64 * 64), min(sizes["max_context"], 64))
    search = {
        "do_sample": False,
        "max_length": max_length,
        "past_present_share_buffer": settings.dialect == ONNXRUNTIME,
    }
    text = json.dumps({"model": model, "search": search}, indent=4)
    (out / "genai_config.json").write_text(text + "\n", encoding="utf-8")
