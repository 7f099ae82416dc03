"""TEQ against a noise model: Gram space loses less, the float block stays what it was, and tune carries it along."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from conftest import tuned
from roundexport.algorithms.interface import BlockInputs
from roundexport.algorithms.rounding import gram
from roundexport.algorithms.transforms import teq_noise
from roundexport.errors import RoundexportError, UsageError
from roundexport.formats.artifact import Artifact
from roundexport.model.block_call import capture_calls, first_hidden
from roundexport.model.blocks import find_stack, linears, weight_of
from roundexport.model.checkpoint import Checkpoint
from roundexport.quant.spec import QuantSpec

Models = Callable[[str], Path]
ROW3 = QuantSpec(3, None, symmetric=False)
LITTLE = 0.01  # damping: 128 tokens, and the loss looked at is theirs
QUICK = teq_noise.TeqNoiseSettings(iterations=40, damping=LITTLE)


def first_block(folder: Path) -> tuple[nn.Module, BlockInputs]:
    """A block whose weights' columns differ in size, as real ones' do, and what enters it."""
    model = Checkpoint.open(folder).load_model().requires_grad_(False)
    stack, generator = find_stack(model), torch.Generator().manual_seed(5)
    for module in linears(stack.blocks[0]).values():
        weight = weight_of(module)
        weight.mul_(torch.randn(weight.shape[1], generator=generator).mul(0.7).exp())
    ids = torch.randint(4, 380, (8, 16), generator=torch.Generator().manual_seed(0))
    call, hidden = capture_calls(model, stack, ids)[0], first_hidden(model, stack, ids, 4)
    target = call.run(stack.blocks[0], hidden)
    return stack.blocks[0], BlockInputs(call, hidden, hidden, target, torch.ones(ids.shape), seed=3)


def gram_loss(block: nn.Module, inputs: BlockInputs, specs: dict[str, QuantSpec]) -> float:
    """Squared error of the block's output with its weights rounded in Gram space."""
    layers = gram.tune_block(block, inputs, specs, gram.GramSettings(damping=LITTLE, keep_size=False)).layers
    weights = {name: torch.from_numpy(linear.dequantize()) for name, linear in layers.items()}
    return float((inputs.call.run(block, inputs.quantized_inputs, weights) - inputs.target).square().mean())


@pytest.mark.parametrize(
    ("family", "spec"),
    [("llama", ROW3), ("gpt2", QuantSpec(2, 16, symmetric=False)), ("llama", QuantSpec(4, 32, symmetric=True))],
)
def test_gram_space_loses_less_and_the_float_block_is_what_it_was(family: str, spec: QuantSpec, models: Models) -> None:
    block, inputs = first_block(models(family))
    specs = dict.fromkeys(linears(block), spec)
    before, state = gram_loss(block, inputs, specs), {n: t.clone() for n, t in block.state_dict().items()}
    changed = teq_noise.transform_block(block, inputs, specs, QUICK).changed
    assert gram_loss(block, inputs, specs) < 0.9 * before
    torch.testing.assert_close(inputs.call.run(block, inputs.float_inputs), inputs.target, rtol=1e-4, atol=1e-4)
    moved = {name for name, tensor in block.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed.keys() == moved - {f"{name}.weight" for name in specs}


def test_columns_become_more_alike_and_the_same_bits_every_time(models: Models) -> None:
    found = []
    for _ in range(2):
        block, inputs = first_block(models("llama"))
        specs = dict.fromkeys(linears(block), ROW3)
        before = column_spread(block.get_submodule("mlp.down_proj").weight)
        teq_noise.transform_block(block, inputs, specs, teq_noise.TeqNoiseSettings(40, 0.06))
        assert column_spread(block.get_submodule("mlp.down_proj").weight) < 0.7 * before
        found.append(block.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def column_spread(weight: Tensor) -> float:
    return float(weight.square().mean(0).log().std())


def test_weights_without_a_scheme_stay_float_and_are_handed_back(models: Models) -> None:
    block, inputs = first_block(models("llama"))
    specs = dict.fromkeys(set(linears(block)) - {"mlp.gate_proj", "self_attn.v_proj"}, ROW3)
    changed = teq_noise.transform_block(block, inputs, specs, QUICK).changed
    assert {"mlp.gate_proj.weight", "self_attn.v_proj.weight", "post_attention_layernorm.weight"} <= changed.keys()


def test_activations_that_are_no_numbers_are_an_error(models: Models) -> None:
    block, inputs = first_block(models("llama"))
    broken = dataclasses.replace(inputs, quantized_inputs=inputs.quantized_inputs * float("nan"))
    with pytest.raises(RoundexportError, match="not finite numbers"):
        teq_noise.transform_block(block, broken, dict.fromkeys(linears(block), ROW3), QUICK)


@pytest.mark.parametrize(
    ("name", "value"), [("iterations", 0), ("batch_size", 0), ("learning_rate", 0.0), ("damping", 1.0)]
)
def test_settings_without_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=name):
        teq_noise.TeqNoiseSettings(**{name: value})


def test_an_artifact_carries_the_changed_norms(models: Models, calibration_text: Path, tmp_path: Path) -> None:
    folder = tuned(
        models("llama"), tmp_path / "out", algorithm="gram", transform="teq_noise", bits=3, group_size=None,
        num_samples=6, sample_len=24, batch_size=3, embedding_bits=None, calibration=str(calibration_text),
    )  # fmt: skip
    artifact = Artifact.open(folder)
    assert artifact.overrides() and all(name.endswith("layernorm.weight") for name in artifact.overrides())
    assert artifact.manifest.algorithm["settings"]["transform"]["name"] == "teq_noise"
