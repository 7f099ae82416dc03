"""Families of experts that transformers' registry does not have: read one by one, and what transformers computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_tools import assert_holds_the_model

from roundexport.errors import CheckpointError, UnsupportedError
from roundexport.families.configurations import families
from roundexport.families.toy import write_model
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.experts import Experts
from roundexport.model.flat_experts import flat_parts
from roundexport.model.skeleton import build_skeleton
from roundexport.model.streamed_model import StreamedModel


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama4_moe", "dbrx", "olmo_hybrid"])
def test_it_is_the_model(family: str, tmp_path: Path) -> None:
    write_model(families()[family], tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    model = assert_holds_the_model(checkpoint)
    if family != "olmo_hybrid":
        (experts, *_) = [module for module in model.modules() if isinstance(module, Experts)]
        assert [expert.entries for expert in experts.experts()] == [("gate_proj", "up_proj")] * 4
    ids = torch.arange(4, 52).view(2, 24)
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = own(ids).logits
    assert float((model(ids).logits - expected).abs().max() / expected.std()) < 1e-5
    assert StreamedModel(checkpoint).streamed


@pytest.mark.parametrize("family", ["llama4_moe", "dbrx"])
def test_stacks_cost_nothing_in_a_skeleton(family: str, tmp_path: Path) -> None:
    write_model(families()[family], tmp_path)
    skeleton = build_skeleton(Checkpoint.open(tmp_path))
    owned = [weight for name, weight in skeleton.named_parameters() if ".experts." in name]
    assert len(owned) >= 4 * 3 and all(weight.is_meta for weight in owned)


def test_more_than_one_expert_a_token_of_llama_4_is_refused(tmp_path: Path) -> None:
    values = {**families()["llama4_moe"].values, "num_experts_per_tok": 2}
    with torch.device("meta"):
        model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**values))
    from roundexport.model.experts import split_experts

    with pytest.raises(UnsupportedError, match="2 experts a token"):
        split_experts(model)


def test_flat_experts_that_do_not_divide_are_refused() -> None:
    shapes = {"a.experts.mlp.w1": (10, 4), "a.router.layer.weight": (4, 4)}
    names = {name: name for name in shapes}
    with pytest.raises(CheckpointError, match="the matrices of 4 experts"):
        list(flat_parts(names, shapes.__getitem__))
    del names["a.router.layer.weight"]
    with pytest.raises(CheckpointError, match="the matrices of 0 experts"):
        list(flat_parts(names, shapes.__getitem__))
