"""A captured graph run in plain torch: what its placeholders mean, spelled out, from the checkpoint's weights."""

from __future__ import annotations

import torch

from roundexport.graph.capture import Capture
from roundexport.graph.rotary import formula
from roundexport.graph.state_functions import recurrence
from roundexport.model.checkpoint import Checkpoint

RX = torch.ops.roundexport


class Reference(torch.fx.Interpreter):
    """Runs a captured graph with every placeholder computed in plain torch from the checkpoint; no cache."""

    def __init__(self, got: Capture, checkpoint: Checkpoint) -> None:
        super().__init__(got.program.module())
        self.got, self.checkpoint = got, checkpoint

    def call_function(self, target, args, kwargs):  # type: ignore[no-untyped-def]
        table = {RX.linear.default: self.linear, RX.embedding.default: self.embedding, RX.rope.default: self.rope,
                 RX.attention.default: self.attention, RX.rms_norm.default: self.rms_norm,
                 RX.causal_conv.default: self.causal_conv, RX.linear_attention.default: self.linear_attention,
                 RX.weighted_average.default: self.weighted_average,
                 RX.tokens_only.default: self.tokens_only, RX.grouped_linear.default: self.grouped_linear}  # fmt: skip
        function = table.get(target)
        return function(*args) if function else super().call_function(target, args, kwargs)

    def linear(self, x, index, out_features):  # type: ignore[no-untyped-def]
        info = self.got.linears[index]
        name = f"{info.name}.weight"
        weight = torch.tensor(self.checkpoint.float32(name))
        weight = weight.T if info.name in self.got.transposed else weight
        assert weight.shape[0] == out_features
        bias = torch.tensor(self.checkpoint.float32(f"{info.name}.bias")) if info.name in self.got.biased else None
        return torch.nn.functional.linear(x, weight, bias)

    def embedding(self, ids, index, width):  # type: ignore[no-untyped-def]
        table = torch.tensor(self.checkpoint.float32(f"{self.got.embeddings[index].name}.weight"))
        assert table.shape[1] == width
        return table[ids]

    def rope(self, x, cos, sin, index, interleaved):  # type: ignore[no-untyped-def]
        if index in self.got.rope_table_of:  # the table must hold what the graph computes
            table = self.got.rope_tables[self.got.rope_table_of[index]]
            length = x.shape[2]
            torch.testing.assert_close(table.cos[:length].expand_as(cos), cos)
            torch.testing.assert_close(table.sin[:length].expand_as(sin), sin)
        return formula(x, cos, sin, interleaved)

    def attention(self, q, k, v, mask, bias, sinks, index, scale, window, softcap, causal):  # type: ignore[no-untyped-def]
        assert sinks is None and softcap == 0
        length, repeat = q.shape[2], q.shape[1] // k.shape[1]
        distance = torch.arange(length)[:, None] - torch.arange(length)[None]
        seen = (distance >= 0) if causal else torch.ones(length, length, dtype=torch.bool)
        if window > 0:
            seen = seen & (distance.abs() < window)
        if chunk := self.got.attentions[index].chunk:
            place = torch.arange(length) // chunk
            seen = seen & (place[:, None] == place[None])
        k, v = (t.repeat_interleave(repeat, 1) for t in (k, v))
        if bias is not None:
            seen = bias + torch.zeros(length, length).masked_fill(~seen, float("-inf"))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)

    def rms_norm(self, x, weight, eps):  # type: ignore[no-untyped-def]
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def causal_conv(self, x, weight, bias, index, silu):  # type: ignore[no-untyped-def]
        channels, taps = weight.shape
        padded = torch.nn.functional.pad(x, (taps - 1, 0))
        y = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=channels)
        return torch.nn.functional.silu(y) if silu else y

    def linear_attention(self, q, k, v, decay, beta, index, groups, scale):  # type: ignore[no-untyped-def]
        return recurrence(q, k, v, decay, beta, scale)

    def weighted_average(self, k, v, decay, first, index):  # type: ignore[no-untyped-def]
        places = torch.arange(k.shape[1], dtype=torch.float64)
        age = (places[:, None] - places - 1)[..., None]  # [t, s, 1]: tokens between the two
        exponents = k.double()[:, None] + torch.where(age < 0, first, decay * age).double()
        return (exponents.masked_fill(age < -1, -torch.inf).softmax(2) * v.double()[:, None]).sum(2).float()

    def tokens_only(self, x, mask):  # type: ignore[no-untyped-def]
        return x * mask[..., None]

    def grouped_linear(self, x, counts, index, out_features):  # type: ignore[no-untyped-def]
        pieces = zip(x.split(counts.tolist()), self.got.groups[index], strict=True)
        done = [torch.cat([self.linear(rows, *self.sized(part)) for part in parts], -1) for rows, parts in pieces]
        return torch.cat(done)

    def sized(self, index):  # type: ignore[no-untyped-def]
        return index, self.got.linears[index].out_features
