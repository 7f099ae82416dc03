"""Attention operators of the graph that OpenVINO's CPU plugin makes of a written one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import openvino as ov

from roundexport.targets.attention_count import FusedAttention


def fused_attention(model_path: Path) -> FusedAttention:
    """Count attention layers in one operator, and rotary embeddings in one.

    Args:
        model_path: the graph; it is compiled.
    """
    compiled = ov.Core().compile_model(str(model_path), "CPU")
    found: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        kind = node.get_rt_info()["layerType"].astype(str)
        if kind != "Softmax" or node.get_output_partial_shape(0).rank.get_length() == 4:
            found[kind] += 1
    return FusedAttention(found["ScaledDotProductAttention"], found["Softmax"], 0, found["RoPE"])
