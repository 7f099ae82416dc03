"""Blocks found, captured and run, for every family, against the model's own forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from conftest import FAMILIES
from roundexport.errors import UnsupportedError
from roundexport.model.block_call import BlockCall, capture_calls, first_hidden, run_all
from roundexport.model.blocks import find_stack, linears, weight_of
from roundexport.model.checkpoint import Checkpoint

CPU = torch.device("cpu")
LINEARS = {"llama": 7, "qwen3": 7, "gemma3": 7, "phi3": 4, "gpt2": 4, "bert": 6, "modernbert": 4}


def sample_ids(rows: int = 5, length: int = 33) -> Tensor:
    return torch.randint(4, 380, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_run_alone_give_the_models_own_hidden_states(family: str, models: Callable[[str], Path]) -> None:
    model = Checkpoint.open(models(family)).load_model().requires_grad_(False)
    stack, ids = find_stack(model), sample_ids()
    assert len(stack.blocks) == 2 and all(len(linears(block)) == LINEARS[family] for block in stack.blocks)
    calls = capture_calls(model, stack, ids)
    outputs: list[Tensor] = []
    for block in stack.blocks:
        block.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    model(input_ids=ids)
    expected = list(outputs)
    hidden = first_hidden(model, stack, ids, batch_size=2)
    for block, call, wanted in zip(stack.blocks, calls, expected, strict=True):
        hidden = run_all(block, call, hidden, 3, CPU)
        # Batches of another size may be summed in another order by BLAS: a few float32 roundings of values near 1.
        torch.testing.assert_close(hidden, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_given_weights_take_the_place_of_the_blocks_own(family: str, models: Callable[[str], Path]) -> None:
    model = Checkpoint.open(models(family)).load_model().requires_grad_(False)
    stack, ids = find_stack(model), sample_ids(2)
    call, block = capture_calls(model, stack, ids)[0], stack.blocks[0]
    hidden = first_hidden(model, stack, ids, 2)
    own = {name: weight_of(module).clone() for name, module in linears(block).items()}
    torch.testing.assert_close(call.run(block, hidden, own), call.run(block, hidden), rtol=1e-6, atol=1e-6)
    doubled = {name: (2 * weight).requires_grad_() for name, weight in own.items()}
    out = call.run(block, hidden, doubled)
    gradients = torch.autograd.grad(out.square().sum(), list(doubled.values()))
    assert all(gradient.shape == weight.shape for gradient, weight in zip(gradients, own.values(), strict=True))
    assert all(bool(gradient.any()) for gradient in gradients)
    assert torch.equal(weight_of(next(iter(linears(block).values()))), next(iter(own.values())))
    assert not torch.allclose(out, call.run(block, hidden))


def test_weight_of_a_transposed_layer_can_be_written(models: Callable[[str], Path]) -> None:
    model = Checkpoint.open(models("gpt2")).load_model().requires_grad_(False)
    layer = linears(find_stack(model).blocks[0])["attn.c_attn"]
    assert weight_of(layer).shape == (192, 64) and layer.weight.shape == (64, 192)
    weight_of(layer).zero_()
    assert not bool(layer.weight.any())


def test_one_sample_is_enough_to_capture(models: Callable[[str], Path]) -> None:
    model = Checkpoint.open(models("gemma3")).load_model()
    calls = capture_calls(model, find_stack(model), sample_ids(1))
    assert len(calls) == 2
    tables = [call.kwargs["position_embeddings"][0].tensor for call in calls]
    assert not torch.equal(*tables), "sliding and full attention have rotary tables of their own"


def test_a_decoder_loaded_as_an_embedder_keeps_no_cache(models: Callable[[str], Path]) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(models("qwen3"), attn_implementation="sdpa").eval()
    assert len(capture_calls(model, find_stack(model), sample_ids(2))) == 2


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, extra: object = None) -> Tensor:
        return self.linear(hidden_states) + (extra if isinstance(extra, Tensor) else 0)


class Model(nn.Module):
    """A model whose way of calling its blocks each test decides."""

    def __init__(self, call: Callable[[Model, Tensor, Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layers = nn.Embedding(16, 8), nn.ModuleList([Layer(), Layer()])
        self.call = call

    def forward(self, input_ids: Tensor) -> object:
        return self.call(self, self.table(input_ids), input_ids)


def refusal(call: Callable[[Model, Tensor, Tensor], object]) -> str:
    model = Model(call)
    with pytest.raises(UnsupportedError) as caught, torch.no_grad():
        capture_calls(model, find_stack(model), torch.arange(12).view(3, 4))
    return str(caught.value)


def test_an_argument_that_depends_on_the_sample_is_refused_by_name() -> None:
    text = refusal(lambda m, h, ids: m.layers[1](m.layers[0](h, extra=ids[..., None].float())))
    assert "layers.0, argument extra" in text and "depends on the sample" in text


def test_work_between_the_blocks_is_refused() -> None:
    assert "not the output of the block before" in refusal(lambda m, h, _: m.layers[1](2 * m.layers[0](h)))


def test_a_block_that_runs_twice_or_never_is_refused() -> None:
    assert "more than once" in refusal(lambda m, h, _: m.layers[0](m.layers[0](h)))
    assert "does not run" in refusal(lambda m, h, _: m.layers[0](h))


class Cache:
    """Something that is neither a tensor nor a plain value."""


def test_an_object_that_cannot_be_shared_is_refused_by_type() -> None:
    assert "Cache cannot be shared" in refusal(lambda m, h, _: m.layers[1](m.layers[0](h, extra=Cache())))


def test_arguments_with_a_batch_axis_are_repeated_for_any_batch() -> None:
    model = Model(lambda m, h, ids: m.layers[1](m.layers[0](h, extra=torch.ones(len(ids), 4, 8))))
    ids = torch.arange(12).view(3, 4)
    call: BlockCall = capture_calls(model, find_stack(model), ids)[0]
    hidden = torch.randn(5, 4, 8)
    torch.testing.assert_close(call.run(model.layers[0], hidden), model.layers[0](hidden, torch.ones(1)))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no blocks found"):
        find_stack(nn.Sequential(nn.Linear(4, 4)))
