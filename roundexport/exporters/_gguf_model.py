"""What a GGUF file says of a model: architecture, sizes, order of rows, for families whose form is known here.

    llama, mistral    llama     rows of q and k in llama.cpp's rotary order: the two halves of a head take turns
    qwen2, qwen3      qwen2, qwen3

Refused by name: other families, rotary angles that are scaled, windows of attention, activations other than SiLU.
Source: conversion/base.py, llama.py and qwen.py of llama.cpp; names are those of the gguf package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import UnsupportedError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_OTHERWISE = "make the float file with llama.cpp's convert_hf_to_gguf.py, or export to another format"


def check_model(config: Mapping[str, Any], task: str, where: str) -> str:
    """The architecture of a model whose graph llama.cpp has.

    Args:
        config: config.json.
        task: the checkpoint's.
        where: the model, for errors.

    Raises:
        UnsupportedError: a family, or a setting of it, whose form in GGUF is not known here.
    """
    family = str(config.get("model_type"))
    if family not in ARCHITECTURES or task != "generate":
        raise UnsupportedError(
            f"{where}: GGUF files are written of decoders of the families {', '.join(ARCHITECTURES)}, not of {family} "
            f"({task}); {_OTHERWISE}"
        )
    rope = rotary(config)
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UnsupportedError(f"{where}: its rotary angles are scaled ({rope}), which is not written; {_OTHERWISE}")
    if config.get("sliding_window") and config.get("use_sliding_window", family == "mistral"):
        raise UnsupportedError(f"{where}: its attention has a window, which is not written; {_OTHERWISE}")
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(f"{where}: its activation is {config['hidden_act']}, llama.cpp's is silu; {_OTHERWISE}")
    return ARCHITECTURES[family]


def rotary(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of the rotary angles, in either spelling."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {"rope_theta": config.get("rope_theta", 10_000.0), **found}


def row_order(name: str, config: Mapping[str, Any], rows: int) -> NDArray[np.intp] | None:
    """Row of the model by row of the file, for a weight or bias; None: as they are."""
    module = name.rsplit(".", 2)[-2]
    if ARCHITECTURES[str(config["model_type"])] != "llama" or module not in ("q_proj", "k_proj"):
        return None
    heads = config["num_attention_heads"]
    if module == "k_proj":
        heads = config.get("num_key_value_heads") or heads
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def write_sizes(writer: Any, config: Mapping[str, Any], name: str) -> None:
    """Put what the architecture needs into a gguf.GGUFWriter.

    Args:
        writer: of the architecture.
        config: config.json.
        name: what the file is to call the model.
    """
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    width = config.get("head_dim") or hidden // heads
    writer.add_type("model")
    writer.add_name(name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rotary(config)["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
