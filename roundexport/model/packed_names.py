"""Files that keep names and packed projections of their first code: nomic-bert, gte, jina-v3, DINOv2, ViT, Nemotron-H.

    encoder.layers.0.attn.Wqkv.weight [3H, H]      rows of layers.0.self_attn.q_proj, k_proj and v_proj, in that order
    encoder.layers.0.norm1.weight                  layers.0.post_attention_layernorm.weight

transformers renames and splits while it loads; the same is done here by name, so that one matrix is read at a time.
Source: conversion_mapping.py of transformers 5.23; held against its classes in tests/model/test_packed_names.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import CheckpointError

_Q_K_V = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_VIT = {
    r"encoder\.layer\.": "layers.", r"attention\.query\.": "q_proj.", r"attention\.key\.": "k_proj.",
    r"attention\.value\.": "v_proj.", r"attention\.output\.dense\.": "attention.o_proj.",
    r"intermediate\.dense\.": "mlp.fc1.", r"output\.dense\.": "mlp.fc2.",
}  # fmt: skip
_DINO = {
    r"attention\.attention\.query\.": "attention.q_proj.", r"attention\.attention\.key\.": "attention.k_proj.",
    r"attention\.attention\.value\.": "attention.v_proj.", r"attention\.output\.dense\.": "attention.o_proj.",
    r"mlp\.weights_out\.": "mlp.down_proj.",
}  # fmt: skip
_RENAMED: dict[str, dict[str, str]] = {
    "nomic_bert": {
        r"^encoder\.layers\.": "layers.", r"^emb_ln\.": "embeddings.LayerNorm.",
        r"\.attn\.out_proj\.": ".self_attn.o_proj.",
        r"\.fc11\.": ".up_proj.", r"\.fc12\.": ".gate_proj.", r"\.fc2\.": ".down_proj.",
        r"\.norm1\.": ".post_attention_layernorm.", r"\.norm2\.": ".post_mlp_layernorm.",
    },
    "jina_embeddings_v3": {
        r"(^|\.)encoder\.layers\.": r"\1layers.", r"(^|\.)emb_ln\.": r"\1embeddings.LayerNorm.",
        r"\.mixer\.out_proj\.": ".self_attn.o_proj.",
        r"\.norm1\.": ".post_attention_layernorm.", r"\.norm2\.": ".post_mlp_layernorm.",
    },
    "gte": {
        r"^new\.": "", r"^encoder\.layer\.": "layers.", r"\.attention\.o_proj\.": ".self_attn.o_proj.",
        r"\.attn_ln\.": ".post_attention_layernorm.", r"\.mlp_ln\.": ".post_mlp_layernorm.",
    },
    "nemotron_h": {r"^backbone\.": "model."},
    "olmo_hybrid": {
        r"\.attention_layer_norm\.": ".input_layernorm.", r"\.feedforward_layer_norm\.": ".post_attention_layernorm.",
    },
    **dict.fromkeys("vit deit ijepa vit_msn".split(), _VIT),
    **dict.fromkeys("dinov2 dinov2_with_registers".split(), _DINO),
}  # fmt: skip
_PACKED: dict[str, dict[str, tuple[str, ...]]] = {
    "nomic_bert": {"attn.Wqkv": _Q_K_V},
    "jina_embeddings_v3": {"mixer.Wqkv": _Q_K_V},
    "gte": {"attention.qkv_proj": _Q_K_V, "mlp.up_gate_proj": ("mlp.up_proj", "mlp.gate_proj")},
    **{kind: {"mlp.weights_in": ("mlp.gate_proj", "mlp.up_proj")} for kind in ("dinov2", "dinov2_with_registers")},
}


def renamed(name: str, model_type: str) -> str:
    """A tensor's name with the module paths of transformers 5, where the family's file has others."""
    for pattern, replacement in _RENAMED.get(model_type, {}).items():
        name = re.sub(pattern, replacement, name)
    return name


@dataclass(frozen=True)
class RowPart:
    """One of several equal parts of a tensor's rows.

    Args:
        number: which, from 0.
        of: how many there are.
    """

    number: int
    of: int

    def shape(self, packed: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the part of a tensor of this shape."""
        return (packed[0] // self.of, *packed[1:])

    def source_rows(self, packed: tuple[int, ...]) -> tuple[int, int]:
        """The rows that must be read for it."""
        rows = packed[0] // self.of
        return self.number * rows, (self.number + 1) * rows

    def cut(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """The part of those rows: all of them."""
        return rows


def packed_parts(
    names: Mapping[str, str], shape: Callable[[str], tuple[int, ...]], model_type: str
) -> Iterator[tuple[str, str, RowPart]]:
    """What is in the packed tensors of a checkpoint.

    Args:
        names: name in the model -> name in the file.
        shape: shape of a tensor of the file.
        model_type: of the config.

    Yields:
        Name of the packed tensor, name of the part, and where it lies.

    Raises:
        CheckpointError: rows that do not divide.
    """
    for packed, parts in _PACKED.get(model_type, {}).items():
        for name, stored in names.items():
            path, found, kind = name.rpartition(f".{packed}.")
            if not found:
                continue
            if shape(stored)[0] % len(parts):
                raise CheckpointError(
                    f"{name} is {list(shape(stored))}; its rows are not those of {len(parts)} matrices"
                )
            for number, part in enumerate(parts):
                yield name, f"{path}.{part}.{kind}", RowPart(number, len(parts))
