"""Gram space on real blocks: less loss than rounding to nearest, schemes kept, hostile inputs, exact repeats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from conftest import tuned
from roundexport.algorithms.common import error_compensation, open_block
from roundexport.algorithms.common.error_compensation import InputSums
from roundexport.algorithms.interface import BlockInputs, BlockSize
from roundexport.algorithms.rounding import gram, rtn
from roundexport.algorithms.rounding._gram_problem import Problem
from roundexport.algorithms.rounding._gram_weight import round_rows
from roundexport.errors import RoundexportError, UsageError
from roundexport.formats.artifact import Artifact
from roundexport.kernels import gram as gram_sums
from roundexport.kernels import gram_rounding
from roundexport.model.block_call import capture_calls, first_hidden, run_all
from roundexport.model.blocks import find_stack, linears, weight_of
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.staged_forward import StagedForward
from roundexport.quant.spec import QuantSpec

Models = Callable[[str], Path]
CPU = torch.device("cpu")
IDS = torch.randint(2, 380, (8, 32), generator=torch.Generator().manual_seed(3))


def given(model_folder: Path, shift: float = 0.0):
    """A block and what it is tuned on; ``shift`` moves the quantized side's inputs away from the float side's."""
    model = Checkpoint.open(model_folder).load_model().requires_grad_(False)
    stack = find_stack(model)
    call, floats = capture_calls(model, stack, IDS)[0], first_hidden(model, stack, IDS, 4)
    block = stack.blocks[0]
    quantized = floats + shift * torch.randn(floats.shape, generator=torch.Generator().manual_seed(4))
    target = run_all(block, call, floats, 4, CPU)
    return block, BlockInputs(call, quantized, floats, target, torch.ones(IDS.shape))


def loss(block, inputs: BlockInputs, layers) -> float:
    weights = {name: torch.from_numpy(layer.dequantize()) for name, layer in layers.items()}
    found = run_all(block, inputs.call, inputs.quantized_inputs, 4, CPU, weights)
    return (found - inputs.target).square().mean().item()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, True)])
def test_it_loses_less_than_rounding_to_nearest(family: str, bits: int, symmetric: bool, models: Models) -> None:
    # The shift cannot be undone by weights: at 4 bits it would be most of the loss.
    block, inputs = given(models(family), shift=0.02 if bits == 2 else 0.0)
    specs = dict.fromkeys(linears(block), QuantSpec(bits, 32, symmetric))
    plain = rtn.tune_block(block, None, specs, rtn.RtnSettings())
    found = gram.tune_block(block, inputs, specs, gram.GramSettings(steps=0))
    assert loss(block, inputs, found.layers) < 0.7 * loss(block, inputs, plain.layers)
    assert {name: layer.spec for name, layer in found.layers.items()} == specs


def test_the_start_by_groups_is_asked_for_by_a_setting(models: Models) -> None:
    block, inputs = given(models("llama"))
    specs = dict.fromkeys(linears(block), QuantSpec(4, 32, True))
    plain = rtn.tune_block(block, None, specs, rtn.RtnSettings())
    columns, groups = (gram.tune_block(block, inputs, specs, gram.GramSettings(start=s)) for s in ("columns", "groups"))
    lost = [loss(block, inputs, found.layers) for found in (groups, columns, plain)]
    assert lost[0] != lost[1] and lost[0] < 0.7 * lost[2]


def test_what_writes_to_the_residual_stream_mends_it(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    block, inputs = given(models("llama"))
    mixing = 0.1 * torch.randn(2 * [inputs.float_inputs.shape[-1]], generator=torch.Generator().manual_seed(4))
    inputs = dataclasses.replace(inputs, quantized_inputs=inputs.float_inputs + inputs.float_inputs @ mixing)
    specs = dict.fromkeys(linears(block), QuantSpec(8, 32, True))
    found = gram.tune_block(block, inputs, specs, gram.GramSettings())
    monkeypatch.setattr(StagedForward, "residual_error", lambda *_: None)
    without = gram.tune_block(block, inputs, specs, gram.GramSettings())
    assert loss(block, inputs, found.layers) < 0.9 * loss(block, inputs, without.layers)


def test_the_polish_lowers_the_blocks_loss(models: Models) -> None:
    block, inputs = given(models("llama"), shift=0.02)
    specs = dict.fromkeys(linears(block), QuantSpec(2, 32, False))
    found = gram.tune_block(block, inputs, specs, gram.GramSettings(steps=30, batch_size=4))
    assert found.loss_before is not None and found.loss_after is not None
    assert found.loss_after < found.loss_before  # little is left to gain in a block of random weights
    assert found.loss_after == pytest.approx(loss(block, inputs, found.layers), rel=0.01)


def test_powers_of_two_stay_powers_of_two(models: Models) -> None:
    block, inputs = given(models("llama"))
    specs = dict.fromkeys(linears(block), QuantSpec(4, 32, True, "exponent8"))
    plain = rtn.tune_block(block, None, specs, rtn.RtnSettings())
    found = gram.tune_block(block, inputs, specs, gram.GramSettings())
    assert loss(block, inputs, found.layers) < loss(block, inputs, plain.layers)


def test_layers_without_a_scheme_stay_float(models: Models) -> None:
    block, inputs = given(models("llama"))
    names = [name for name in linears(block) if "q_proj" not in name]
    found = gram.tune_block(block, inputs, dict.fromkeys(names, QuantSpec(4, 32)), gram.GramSettings())
    assert sorted(found.layers) == sorted(names)


def test_dead_inputs_and_equal_groups(models: Models) -> None:
    block, inputs = given(models("llama"))
    norm = block.input_layernorm.weight
    norm[:40] = 0  # a whole group of q's, k's and v's inputs, and a part of one, is always 0
    weight = weight_of(block.self_attn.q_proj)
    weight[:, :32] = 0.25
    weight[0] = 0
    specs = dict.fromkeys(linears(block), QuantSpec(4, 32, False))
    found = gram.tune_block(block, inputs, specs, gram.GramSettings())
    wide = torch.from_numpy(found.layers["self_attn.q_proj"].dequantize())
    assert torch.isfinite(wide).all() and wide[0].abs().max() < 1e-6
    assert torch.allclose(wide[1:, :32], torch.tensor(0.25), atol=0.02)


def test_fewer_samples_than_can_be_held_out(models: Models) -> None:
    block, inputs = given(models("llama"), shift=0.02)
    few = dataclasses.replace(
        inputs, **{name: getattr(inputs, name)[:3] for name in ("quantized_inputs", "float_inputs", "target", "mask")}
    )
    specs = dict.fromkeys(linears(block), QuantSpec(2, 32, False))
    plain = rtn.tune_block(block, None, specs, rtn.RtnSettings())
    found = gram.tune_block(block, few, specs, gram.GramSettings())
    assert loss(block, inputs, found.layers) < loss(block, inputs, plain.layers)


def test_activations_that_are_no_numbers_are_refused(models: Models) -> None:
    block, inputs = given(models("llama"))
    inputs.quantized_inputs[0, 0, 0] = float("nan")
    with pytest.raises(RoundexportError, match="not finite"):
        gram.tune_block(block, inputs, dict.fromkeys(linears(block), QuantSpec(4, 32)), gram.GramSettings())


def test_same_seed_same_bytes_through_a_whole_run(models: Models, tmp_path: Path) -> None:
    quick = {
        "algorithm": None,
        "bits": 2,
        "group_size": 32,
        "num_samples": 6,
        "sample_len": 32,
        "steps": 3,
        "batch_size": 4,
    }
    for name in ("a", "b"):
        tuned(models("qwen3"), tmp_path / name, **quick)
    assert Artifact.open(tmp_path / "a").manifest.algorithm["name"] == "gram"
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_batches_that_do_not_wait_give_the_same_bytes(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {"algorithm": "gram", "bits": 2, "group_size": 32, "num_samples": 6, "sample_len": 32, "batch_size": 4}
    waiting = tuned(models("qwen3"), tmp_path / "waiting", **quick)
    monkeypatch.setattr(open_block, "_fits", lambda *_: False)
    again = tuned(models("qwen3"), tmp_path / "again", **quick)
    for file in waiting.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()


@pytest.mark.parametrize(
    "wrong", [{"damping": 0.0}, {"damping": 2.0}, {"sweeps": -1}, {"steps": -1}, {"batch_size": 0}, {"start": "rows"}]
)
def test_settings_without_sense_are_refused(wrong: dict[str, float | str]) -> None:
    with pytest.raises(UsageError):
        gram.GramSettings(**wrong)


def test_what_a_linear_loses_is_a_share_of_its_outputs_energy(models: Models) -> None:
    block, inputs = given(models("llama"))
    specs = dict.fromkeys(linears(block), QuantSpec(4, 32))
    found = gram.tune_block(block, inputs, specs, gram.GramSettings())
    assert set(found.layer_losses) == set(specs)
    assert all(0 < after < before < 1 for before, after in found.layer_losses.values())
    # The first linear, by hand: its inputs are the float model's, so that the weight itself is what it aims at.
    seen: list[torch.Tensor] = []
    handle = linears(block)["self_attn.q_proj"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run_all(block, inputs.call, inputs.float_inputs, 4, CPU)
    handle.remove()
    x, weight = torch.cat(seen).flatten(0, 1).double(), weight_of(linears(block)["self_attn.q_proj"]).double()
    nearest = rtn.tune_block(block, None, specs, rtn.RtnSettings()).layers
    for layers, share in zip((nearest, found.layers), found.layer_losses["self_attn.q_proj"], strict=True):
        error = torch.from_numpy(layers["self_attn.q_proj"].dequantize()).double() - weight
        expected = float((x @ error.t()).square().sum() / (x @ weight.t()).square().sum())
        assert share == pytest.approx(expected, rel=2e-3)


def test_losses_of_layers_reach_the_artifact(models: Models, tmp_path: Path) -> None:
    little = {"num_samples": 8, "sample_len": 64}
    artifact = Artifact.open(tuned(models("llama"), tmp_path / "a", algorithm="gram", bits=4, **little))
    losses = {e.info.name: (e.loss_before, e.loss_after) for e in artifact.manifest.layers if "layers." in e.info.name}
    assert len(set(losses.values())) == len(losses)
    assert all(before is not None and after is not None and after < before for before, after in losses.values())


def test_what_waits_must_fit_beside_the_sums(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    block, inputs = given(models("llama"))
    size = BlockSize.of(block, *inputs.mask.shape)
    empty = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(open_block.psutil, "Process", lambda: empty)
    waiting, beside = 4 * open_block.waiting(size), 4 * open_block.beside(size)
    assert beside > 4 * 5 * size.widest**2
    assert open_block._fits(dataclasses.replace(inputs, max_bytes=int(waiting + beside) + 1), block)
    assert not open_block._fits(dataclasses.replace(inputs, max_bytes=int(waiting + beside)), block)


def test_a_massive_token_does_not_damp_what_is_usual() -> None:
    generator = torch.Generator().manual_seed(5)
    usual = torch.randn(512, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    usual += 0.1 * torch.randn(usual.shape, generator=generator)
    massive = torch.zeros(2, 64)
    massive[:, [3, 40]] = torch.tensor([[2000.0, -1000.0], [1900.0, -1100.0]])
    weight, spec = torch.randn(32, 64, generator=generator), QuantSpec(3, 32, False)

    def error(tokens: Tensor, share: Callable[[Tensor, float], float]) -> float:
        ones = torch.ones(len(tokens))
        problem = Problem.of([InputSums(*gram_sums.run(tokens, tokens, ones))], [weight], 0.3, share=share)
        rounded = round_rows(weight, spec, problem.tensors(), gram.GramSettings().effort()).weight()
        return float((usual @ (rounded - weight).t()).square().mean())

    alone = error(usual, error_compensation.mean_share)
    shares = (gram_rounding.usual_share, error_compensation.mean_share)
    by_usual, by_mean = (error(torch.cat([usual, massive]), share) for share in shares)
    assert error(usual, gram_rounding.usual_share) < 1.1 * alone
    assert by_usual < 4 * alone and by_usual < 0.3 * by_mean


@pytest.mark.parametrize(
    ("diagonal", "expected"),
    [
        ([4.0] * 64, 0.3 * 4),
        ([1.0] * 63 + [1e4], 0.3 * (163 / 64) ** 2),  # whose mean is 157
        ([0.0] * 4, 1.0),
        ([0.0, 0.0, 1e9, 0.0], 0.3 * 1e9 / 16),
        ([0.0] * 1999 + [1e9], 1e3),  # float32 could not factor it with 0.3 * 250 added
    ],
)
def test_damping_is_a_share_of_a_usual_input(diagonal: list[float], expected: float) -> None:
    found = gram_rounding.usual_share(torch.diag(torch.tensor(diagonal)), 0.3)
    assert found == pytest.approx(expected, rel=1e-3)
