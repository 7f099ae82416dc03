"""Capture: every family's own forward becomes a graph of placeholders that computes what the model computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from captured_reference import Reference

from conftest import DECODERS, ENCODERS, FAMILIES
from roundexport.errors import UnsupportedError
from roundexport.graph.capture import Capture, capture
from roundexport.graph.kept_captures import capture_once, captures_kept
from roundexport.model.checkpoint import Checkpoint

Captured = Callable[[str], Capture]


@pytest.fixture(scope="module")
def captured(models: Callable[[str], Path]) -> Iterator[Captured]:
    """``captured("llama")``: captured once for all tests here, which only look at it."""
    with captures_kept(len(FAMILIES)):
        yield lambda family: capture_once(Checkpoint.open(models(family)))


def counted(got: Capture) -> Counter[str]:
    return Counter(str(n.target) for n in got.program.graph.nodes if n.op == "call_function")


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_graph_computes_what_the_model_computes(
    family: str, models: Callable[[str], Path], captured: Captured
) -> None:
    checkpoint = Checkpoint.open(models(family))
    got = captured(family)
    ids = torch.randint(4, 384, (2, 19), generator=torch.Generator().manual_seed(0))
    ones = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": ones}
    if "position_ids" in got.inputs:
        inputs["position_ids"] = torch.arange(19).expand(2, 19)
    if "token_type_ids" in got.inputs:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    with torch.no_grad():
        out = checkpoint.load_model()(input_ids=ids, attention_mask=ones)
        expected = out.logits if got.task == "generate" else out.last_hidden_state
        found = Reference(got, checkpoint).run(*(inputs[name] for name in got.inputs))
    # Same float32 arithmetic in another order: a few hundred roundings of 6e-8 relative.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_decoder_keeps_no_large_weight_in_the_graph(family: str, captured: Captured) -> None:
    got = captured(family)
    largest = max((t.numel() for t in got.program.state_dict.values()), default=0)
    assert largest <= 64, "only norms and small biases may stay"
    names = counted(got)
    assert names["roundexport.attention.default"] == 2
    assert names["roundexport.linear.default"] == len(got.linears)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_rope_gets_a_table_per_rotary_base(family: str, captured: Captured) -> None:
    got = captured(family)
    assert len(got.rope_tables) == (2 if family == "gemma3" else 1)
    assert sorted(got.rope_table_of) == [0, 1, 2, 3], "queries and keys of two layers"
    assert got.rope_tables[0].cos.shape[0] == got.max_context == 512


def test_gemma_norm_weight_includes_its_one(models: Callable[[str], Path], captured: Captured) -> None:
    checkpoint = Checkpoint.open(models("gemma3"))
    got = captured("gemma3")
    weight = got.program.state_dict["model.model.norm.weight"].numpy()
    np.testing.assert_allclose(weight, 1.0 + checkpoint.float32("model.norm.weight"), rtol=1e-6)


def test_window_and_causality_are_recorded(captured: Captured) -> None:
    gemma = captured("gemma3")
    assert [a.window for a in gemma.attentions] == [8, -1]
    assert all(a.causal for a in gemma.attentions)
    for family in ENCODERS:
        assert not any(a.causal for a in captured(family).attentions)


def test_tied_head_is_named_with_its_embedding(captured: Captured) -> None:
    assert captured("qwen3").embeddings[0].shared_with == ("lm_head",)
    assert captured("llama").embeddings[0].shared_with == ()


def test_override_wins_over_the_checkpoint(models: Callable[[str], Path]) -> None:
    new = np.full(64, 3.0, np.float32)
    got = capture(Checkpoint.open(models("llama")), {"model.norm.weight": new})
    np.testing.assert_array_equal(got.program.state_dict["model.model.norm.weight"].numpy(), new)


def test_unused_pooler_is_not_in_the_graph(captured: Captured) -> None:
    got = captured("bert")
    assert counted(got)["roundexport.linear.default"] == 12
    assert any("pooler" in info.name for info in got.linears)


def test_products_of_experts_are_one_placeholder_for_gate_and_up_and_one_for_down(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    got = capture(Checkpoint.open(tmp_path))
    entering, leaving = got.groups
    path = "model.layers.0.mlp.experts.3"
    assert [got.linears[index].name for index in entering[3]] == [f"{path}.gate_proj", f"{path}.up_proj"]
    assert [got.linears[index].name for index in leaving[3]] == [f"{path}.down_proj"]
    assert counted(got)["roundexport.grouped_linear.default"] == 2
    assert got.uses()[f"{path}.gate_proj"] == got.uses()[f"{path}.down_proj"] == 1


def test_written_out_attention_is_refused(tmp_path: Path) -> None:
    from transformers import CpmAntConfig, CpmAntForCausalLM

    config = CpmAntConfig(
        vocab_size=384, hidden_size=64, num_attention_heads=4, dim_head=16, dim_ff=128, num_hidden_layers=1
    )
    CpmAntForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="spells its attention out"):
        capture(Checkpoint.open(tmp_path))


def test_capture_restores_what_it_patched(models: Callable[[str], Path]) -> None:
    from transformers.models.llama import modeling_llama

    before = (torch.nn.Linear.__init__, torch.nn.Embedding.__init__, modeling_llama.apply_rotary_pos_emb)
    capture(Checkpoint.open(models("llama")))
    assert (torch.nn.Linear.__init__, torch.nn.Embedding.__init__, modeling_llama.apply_rotary_pos_emb) == before


def test_a_program_does_not_depend_on_the_order_of_sets(
    models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Gemma 3 computes its two rotary tables in the order of a set of names, which changes with the hashes of a process.
    from transformers.models.gemma3 import modeling_gemma3

    class Forward(set[str]):
        def __iter__(self) -> Iterator[str]:
            return iter(sorted(super().__iter__()))

    class Backward(set[str]):
        def __iter__(self) -> Iterator[str]:
            return iter(sorted(super().__iter__(), reverse=True))

    programs = []
    for kind in (Forward, Backward):
        monkeypatch.setattr(modeling_gemma3, "set", kind, raising=False)
        programs.append(str(capture(Checkpoint.open(models("gemma3"))).program.graph))
    assert programs[0] == programs[1]
