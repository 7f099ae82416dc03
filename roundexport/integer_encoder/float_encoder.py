"""A BERT encoder's float side: its weights by role, and its forward with every intermediate tensor laid open.

    x ─ query, key, value ─ softmax ─ mixed ─ output ─ + x ─ norm ─ middle ─ up ─ GELU ─ inner ─ down ─ + ─ norm ─ last

A tap is called with the name of each of these tensors and its values, and may put others in their place: to record
what calibration needs, or to round one tensor and leave all others, which tells what it costs.

Limits: transformers' BertModel, which MiniLM, E5, BGE, GTE and their kind are; others are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from roundexport.errors import UnsupportedError
from roundexport.kernels.integer_table import FUNCTIONS
from roundexport.model.checkpoint import Checkpoint

LINEARS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
"""Linears of a block by the name of the tensor that they give."""
SUMMED = ("output", "down")
"""Tensors that only meet an addition before a norm."""
NORMS = {"middle": "attention.output.LayerNorm", "last": "output.LayerNorm"}
TABLES = tuple(f"embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type"))
EMBEDDING_NORM = "embeddings.LayerNorm"

Tap = Callable[[str, Tensor], Tensor]


def untouched(_: str, values: Tensor) -> Tensor:
    """The tap that does nothing."""
    return values


def check_kind(checkpoint: Checkpoint) -> None:
    """Refuse, before any work, a model that integer encoders are not made of.

    Raises:
        UnsupportedError: it is no BERT.
    """
    if checkpoint.model_type != "bert":
        raise UnsupportedError(
            f"{checkpoint.location}: integer encoders are made of BERT models, this is {checkpoint.model_type!r}"
        )


@dataclass(frozen=True, eq=False)
class FloatEncoder:
    """Weights and shapes of a BertModel.

    Args:
        weights: parameters by name, without a pooler's.
        layers: blocks.
        heads: attention heads.
        epsilon: of the norms.
        activation: its name in the configuration.
    """

    weights: dict[str, Tensor]
    layers: int
    heads: int
    epsilon: float
    activation: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> FloatEncoder:
        """The float model of a checkpoint.

        Raises:
            UnsupportedError: it is no BERT, or has parts that integers are not made for here.
        """
        check_kind(checkpoint)
        model = checkpoint.load_model()
        config: Any = model.config
        if config.hidden_act not in FUNCTIONS:
            known = ", ".join(sorted(FUNCTIONS))
            raise UnsupportedError(
                f"{checkpoint.location}: hidden_act {config.hidden_act!r} has no table; {known} have"
            )
        if config.is_decoder or config.add_cross_attention:
            raise UnsupportedError(f"{checkpoint.location}: a decoder; integer encoders read all tokens at once")
        weights = {name: value.detach().float() for name, value in model.named_parameters() if "pooler" not in name}
        return cls(
            weights, config.num_hidden_layers, config.num_attention_heads, config.layer_norm_eps, config.hidden_act
        )

    def with_weights(self, changed: dict[str, Tensor]) -> FloatEncoder:
        """The same encoder with some weights in place of its own."""
        return FloatEncoder({**self.weights, **changed}, self.layers, self.heads, self.epsilon, self.activation)

    def linear(self, block: int, tensor: str) -> str:
        """Name of the linear that gives a tensor of a block."""
        return f"encoder.layer.{block}.{LINEARS[tensor]}"

    def norm_name(self, block: int, tensor: str) -> str:
        """Name of the norm that gives a tensor of a block."""
        return f"encoder.layer.{block}.{NORMS[tensor]}"

    def summed(self, ids: Tensor, types: Tensor) -> Tensor:
        """Rows of the three tables, added [B, T, C]."""
        where = (ids, torch.arange(ids.shape[1]).expand_as(ids), types)
        rows = [self.weights[f"{name}.weight"][index] for name, index in zip(TABLES, where, strict=True)]
        return rows[0] + rows[1] + rows[2]

    def after_sum(self, summed: Tensor, tap: Tap = untouched) -> Tensor:
        """Hidden states before the first block [B, T, C], of the sum of rows."""
        return tap("embedded", self._norm(summed, EMBEDDING_NORM))

    def embed(self, ids: Tensor, types: Tensor, tap: Tap = untouched) -> Tensor:
        """Hidden states before the first block [B, T, C], of token ids."""
        return self.after_sum(self.summed(ids, types), tap)

    def run_block(self, index: int, x: Tensor, mask: Tensor, tap: Tap = untouched) -> Tensor:
        """Hidden states after a block, of those before it [B, T, C] and the mask [B, T]."""
        batch, tokens, width = x.shape

        def of_heads(values: Tensor) -> Tensor:
            return values.view(batch, tokens, self.heads, -1).transpose(1, 2)

        def linear(tensor: str, values: Tensor) -> Tensor:
            name = self.linear(index, tensor)
            given = nn.functional.linear(values, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])
            return tap(tensor, given)

        q, k, v = (of_heads(linear(tensor, x)) for tensor in ("query", "key", "value"))
        seen = mask.bool()[:, None, None, :]
        together = nn.functional.scaled_dot_product_attention(q, k, v, seen)
        mixed = tap("mixed", together.transpose(1, 2).reshape(batch, tokens, width))
        middle = tap("middle", self._norm(linear("output", mixed) + x, self.norm_name(index, "middle")))
        inner = tap("inner", self._activate(linear("up", middle)))
        return tap("last", self._norm(linear("down", inner) + middle, self.norm_name(index, "last")))

    def __call__(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        """Last hidden states [B, T, C]."""
        x = self.embed(ids, types)
        for index in range(self.layers):
            x = self.run_block(index, x, mask)
        return x

    def _norm(self, values: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return nn.functional.layer_norm(values, weight.shape, weight, bias, self.epsilon)

    def _activate(self, values: Tensor) -> Tensor:
        if self.activation == "relu":
            return values.relu()
        return nn.functional.gelu(values, approximate="none" if self.activation == "gelu" else "tanh")
