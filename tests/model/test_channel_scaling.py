"""Folding: which pairs are found in every family, that folding any factors changes nothing, and what must not fold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from conftest import FAMILIES
from roundexport.model.block_call import BlockCall, capture_calls, first_hidden
from roundexport.model.blocks import find_stack, linears, weight_of
from roundexport.model.channel_scaling import Pair, find_pairs, fold, folded
from roundexport.model.checkpoint import Checkpoint

QKV = "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"
GATED = {"self_attn.v_proj -> self_attn.o_proj", "mlp.up_proj -> mlp.down_proj", f"input_layernorm -> {QKV}"}
LLAMA = {*GATED, "post_attention_layernorm -> mlp.gate_proj, mlp.up_proj"}
MODERNBERT = {"attn.Wqkv -> attn.Wo", "mlp_norm -> mlp.Wi", "mlp.Wi -> mlp.Wo"}
# What folds in the first block and in the second.  BERT's norms feed the residual too; ModernBERT's first block has no
# norm before its attention; GELU in GPT-2 and BERT is no multiple of its input.
EXPECTED: dict[str, tuple[set[str], set[str]]] = {
    "llama": (LLAMA, LLAMA),
    "qwen3": (LLAMA, LLAMA),
    "gemma3": ({*GATED, "pre_feedforward_layernorm -> mlp.gate_proj, mlp.up_proj"},) * 2,
    "phi3": ({"input_layernorm -> self_attn.qkv_proj", "self_attn.qkv_proj -> self_attn.o_proj",
              "post_attention_layernorm -> mlp.gate_up_proj", "mlp.gate_up_proj -> mlp.down_proj"},) * 2,
    "gpt2": ({"ln_1 -> attn.c_attn", "attn.c_attn -> attn.c_proj", "ln_2 -> mlp.c_fc"},) * 2,
    "bert": ({"attention.self.value -> attention.output.dense"},) * 2,
    "modernbert": (MODERNBERT, {*MODERNBERT, "attn_norm -> attn.Wqkv"}),
}  # fmt: skip
Models = Callable[[str], Path]


def factors(pairs: tuple[Pair, ...], seed: int = 0) -> list[Tensor]:
    """Positive factors between 1/7 and 7 or so."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(pair.width, generator=generator).exp() for pair in pairs]


def loaded(folder: Path) -> tuple[list[nn.Module], list[BlockCall], Tensor]:
    model = Checkpoint.open(folder).load_model().requires_grad_(False)
    ids = torch.randint(4, 380, (2, 16), generator=torch.Generator().manual_seed(0))
    stack = find_stack(model)
    return list(stack.blocks), capture_calls(model, stack, ids), first_hidden(model, stack, ids, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair_of_a_family_is_found_and_folds_exactly(family: str, models: Models) -> None:
    blocks, calls, hidden = loaded(models(family))
    for block, call, expected in zip(blocks, calls, EXPECTED[family], strict=True):
        before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        pairs = find_pairs(block, call, hidden[:1])
        assert {pair.describe() for pair in pairs} == expected
        assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())
        output = call.run(block, hidden)
        changed = fold(block, pairs, factors(pairs)).names
        moved = {name for name, tensor in block.state_dict().items() if not torch.equal(before[name], tensor)}
        assert set(changed) == moved
        difference = (call.run(block, hidden) - output).abs().max() / output.abs().max()
        # Two float32 roundings more per weight (2**-24 each) and sums in the same order: a few 1e-7.
        assert difference < 2e-6, f"{family}: {difference:.1e}"
        hidden = output


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_of_one_leave_every_bit(family: str, models: Models) -> None:
    blocks, calls, hidden = loaded(models(family))
    before = {name: tensor.clone() for name, tensor in blocks[1].state_dict().items()}
    pairs = find_pairs(blocks[1], calls[1], hidden)
    fold(blocks[1], pairs, [torch.ones(pair.width) for pair in pairs])
    for name, tensor in blocks[1].state_dict().items():
        # Gemma's weight leaves as (1 + w) - 1, which rounds once.
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=2.0**-24 if family == "gemma3" else 0)


def test_a_key_value_channel_is_read_by_every_head_of_its_group(models: Models) -> None:
    blocks, calls, hidden = loaded(models("llama"))
    pair = next(p for p in find_pairs(blocks[0], calls[0], hidden) if p.producer == "self_attn.v_proj")
    # 4 heads of 16 over 2 key-value heads: heads 0 and 1 read channels 0-15, heads 2 and 3 channels 16-31.
    expected = torch.arange(32).view(2, 1, 16).expand(2, 2, 16).flatten()
    assert pair.width == 32 and torch.equal(pair.consumers["self_attn.o_proj"], expected)


@pytest.mark.parametrize(("family", "rows"), [("phi3", {(96, 32), (128, 128)}), ("gpt2", {(128, 64)})])
def test_of_a_fused_weight_only_the_rows_that_are_read_as_they_are_take_part(
    family: str, rows: set[tuple[int, int]], models: Models
) -> None:
    blocks, calls, hidden = loaded(models(family))
    pairs = find_pairs(blocks[0], calls[0], hidden)
    assert {(pair.start, pair.width) for pair in pairs if pair.offset is None} == rows


def test_gradients_reach_the_factors(models: Models) -> None:
    blocks, calls, hidden = loaded(models("gpt2"))
    pairs = find_pairs(blocks[0], calls[0], hidden)
    alphas = [alpha.requires_grad_() for alpha in factors(pairs)]
    new = folded(blocks[0], pairs, alphas)
    assert {"ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "attn.c_attn.bias"} == new.others.keys()
    kept = calls[0].run(blocks[0], hidden, new.weights, new.others)
    torch.testing.assert_close(kept, calls[0].run(blocks[0], hidden), rtol=1e-4, atol=1e-5)
    halved = calls[0].run(blocks[0], hidden, {n: w * 0.5 for n, w in new.weights.items()}, new.others)
    assert all(bool(gradient.any()) for gradient in torch.autograd.grad(halved.square().sum(), alphas))


class Mlp(nn.Module):
    """norm, fc1, an activation, fc2, and whatever ``extra`` reads of the norm."""

    def __init__(self, activation: nn.Module, extra: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act, self.extra = activation, extra
        self.requires_grad_(False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = self.norm(hidden_states)
        out = hidden_states + self.fc2(self.act(self.fc1(normed)))
        return out if self.extra is None else out + self.extra(normed)


def described(block: nn.Module, width: int = 16) -> set[str]:
    hidden = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(1))
    return {pair.describe() for pair in find_pairs(block, BlockCall((), {}, False), hidden)}


def test_through_relu_a_linear_folds_and_through_gelu_it_does_not() -> None:
    assert described(Mlp(nn.ReLU())) == {"norm -> fc1", "fc1 -> fc2"}
    assert described(Mlp(nn.LeakyReLU(0.1))) == {"norm -> fc1", "fc1 -> fc2"}
    assert described(Mlp(nn.GELU())) == described(Mlp(nn.SiLU())) == {"norm -> fc1"}


def test_a_norm_that_anything_else_reads_does_not_fold() -> None:
    assert described(Mlp(nn.GELU(), extra=lambda normed: 0.01 * normed)) == set()
    assert described(Mlp(nn.GELU(), extra=lambda normed: normed.softmax(-1))) == set()


def test_a_linear_that_runs_twice_takes_no_part() -> None:
    class Twice(Mlp):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(super().forward(hidden_states))

    assert described(Twice(nn.ReLU())) == set()


def test_a_block_with_massive_channels_is_judged_channel_by_channel() -> None:
    """Output channels of 1e5 beside ones of 1: float32 noise of the former must not decide about the latter."""

    class Massive(Mlp):
        def forward(self, hidden_states: Tensor) -> Tensor:
            scale = torch.ones(16).index_fill(0, torch.tensor([3]), 1e5)
            return super().forward(hidden_states) * scale

    assert described(Massive(nn.ReLU())) == {"norm -> fc1", "fc1 -> fc2"}
    assert described(Massive(nn.ReLU(), extra=lambda normed: 0.01 * normed)) == {"fc1 -> fc2"}


def test_dead_channels_fold() -> None:
    block = Mlp(nn.ReLU())
    weight_of(block.fc1)[5].zero_()
    block.fc1.bias[5] = -1.0
    assert described(block) == {"norm -> fc1", "fc1 -> fc2"}
    assert set(linears(block)) == {"fc1", "fc2"}
