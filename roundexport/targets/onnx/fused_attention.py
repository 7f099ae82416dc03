"""Attention operators of a written ONNX graph, counted by name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx

from roundexport.targets.attention_count import FusedAttention

from .graph import MICROSOFT

_FUSED = ("GroupQueryAttention", "MultiHeadAttention")


def fused_attention(model_path: Path) -> FusedAttention:
    """Count attention layers in one operator, and rotary embeddings.

    Args:
        model_path: the graph; its weights are not read.
    """
    nodes = onnx.load(str(model_path), load_external_data=False).graph.node
    found = Counter(node.op_type for node in nodes if node.domain == MICROSOFT)
    inside = sum(attribute.i for node in nodes for attribute in node.attribute if attribute.name == "do_rotary")
    readers = {name: node.op_type for node in nodes for name in node.input}
    spelled = [node for node in nodes if node.op_type == "Softmax" and readers.get(node.output[0]) == "MatMul"]
    return FusedAttention(sum(found[kind] for kind in _FUSED), len(spelled), inside, found["RotaryEmbedding"])
