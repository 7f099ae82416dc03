"""Scores: the replay by block is a backward pass, fisher scores are the KL that layers cost, on every family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from conftest import ENCODERS, FAMILIES
from roundexport.calibration.samples import load_calibration
from roundexport.errors import RoundexportError, UsageError
from roundexport.model.blocks import linears, weight_of
from roundexport.model.blockwise_backward import BackwardSettings, open_backward
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.streamed_model import StreamedModel
from roundexport.quant.spec import QuantSpec
from roundexport.schemes import sensitivity
from roundexport.schemes.sensitivity import score
from roundexport.schemes.settings import Rounding
from roundexport.tuning.settings import TuneSettings

Models = Callable[[str], Path]
TWO, FOUR, EIGHT = QuantSpec(2, 32, False), QuantSpec(4, 32), QuantSpec(8, 32)


def opened_model(folder: Path, whole: bool = False) -> tuple[StreamedModel, Tensor]:
    torch.manual_seed(0)
    return StreamedModel(Checkpoint.open(folder), whole), torch.randint(4, 384, (3, 12))


def paths(weights: StreamedModel) -> list[str]:
    stack = weights.stack
    return [f"{stack.block_name(i)}.{name}" for i, block in enumerate(stack.blocks) for name in linears(block)]


def output_of(family: str, model: torch.nn.Module, ids: Tensor) -> Tensor:
    out = model(input_ids=ids)
    found: Tensor = out.last_hidden_state if family in ENCODERS else out.logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("whole", [False, True])
def test_the_replay_by_block_is_a_backward_pass(family: str, whole: bool, models: Models) -> None:
    weights, ids = opened_model(models(family), whole)
    target = torch.randn(3, 12, 64 if family in ENCODERS else 384)
    found: dict[str, Tensor] = {}

    def seen(path: str, x: Tensor, gradient: Tensor) -> None:
        found[path] = found.get(path, torch.zeros(())) + gradient.t() @ x

    with open_backward(weights, ids, BackwardSettings(batch_size=2)) as model, torch.no_grad():
        model.forward()
        model.backward(model.output_gradient(lambda output, part: (output * target[part]).sum(), seen), seen)
    whole_model = Checkpoint.open(models(family)).load_model()
    assert sorted(found) == sorted(paths(weights))
    for path in found:
        whole_model.get_submodule(path).weight.requires_grad_(True)
    (output_of(family, whole_model, ids) * target).sum().backward()
    for path, gradient in found.items():
        module: Any = whole_model.get_submodule(path)
        expected = module.weight.grad.t() if type(module).__name__ == "Conv1D" else module.weight.grad
        assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())), path


@pytest.mark.parametrize("aside", [0, 2])
def test_sums_of_inputs_are_those_of_the_whole_model_on_samples_set_aside(aside: int, models: Models) -> None:
    weights, ids = opened_model(models("qwen3"))
    model, seen = Checkpoint.open(models("qwen3")).load_model(), dict[str, Tensor]()
    for path in paths(weights):
        module: Any = model.get_submodule(path)
        module.register_forward_pre_hook(lambda _, args, path=path: seen.update({path: args[0].flatten(0, -2)}))
    with torch.no_grad():
        model(input_ids=ids[: aside or len(ids)])
    with open_backward(weights, ids, BackwardSettings(batch_size=2)) as run, torch.no_grad():
        run.forward()
        run.set_aside(aside)
        with weights.block(1, torch.device("cpu")) as block:
            found = run.input_sums(block, weights.stack.block_name(1))
    assert [[path.rpartition(".")[2] for path in names] for names in found] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]
    ]  # fmt: skip
    for names, gram in found.items():
        expected = seen[names[0]].t() @ seen[names[0]]
        assert torch.allclose(gram, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())), names


def test_a_layer_whose_errors_can_be_compensated_scores_less() -> None:
    weight, spec = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)), {"a": (QuantSpec(2, 32, False),)}
    few = torch.randn(200, 6, generator=torch.Generator().manual_seed(2)) @ torch.randn(6, 64)
    lost = {}
    for name, x in (("few directions", few), ("all", torch.randn(200, 64))):
        (error,) = sensitivity._errors_in_gram_space({"a": weight}, spec, x.t() @ x)["a"]
        nearest = sensitivity._rounded(weight, spec["a"][0], x.square().sum(0), "a") - weight
        lost[name] = float((x @ error.float().t()).square().sum() / (x @ nearest.t()).square().sum())
    with pytest.raises(RoundexportError, match="activations that enter a are not finite"):
        sensitivity._errors_in_gram_space({"a": weight}, spec, torch.full((64, 64), torch.inf))
    assert lost["few directions"] < 0.3
    assert 0.5 < lost["all"] < 1


@pytest.mark.parametrize(("samples", "for_sums"), [(1, 0), (2, 1), (3, 2), (16, 8), (24, 16)])
def test_a_layer_is_scored_on_other_samples_than_it_is_rounded_for(samples: int, for_sums: int) -> None:
    assert sensitivity.fitted(samples) == for_sums


def test_a_layer_is_scored_with_the_rounding_that_it_will_get(models: Models) -> None:
    weights, ids = opened_model(models("qwen3"))
    options = dict.fromkeys(paths(weights)[:7], (TWO,))
    sums = [
        sum(v for (v,) in score(weights, ids, options, rounding=kind).losses.values()) for kind in get_args(Rounding)
    ]
    nearest, searched, gram = sums
    assert nearest > searched
    assert nearest != gram != searched
    asked = {"rtn": "nearest", "light": "gram", "best": "gram"}
    assert {recipe: TuneSettings(recipe=recipe).schemes.search.rounding for recipe in asked} == asked
    assert TuneSettings(algorithm="optimal_rtn").schemes.search.rounding == "searched"


def test_the_model_is_left_as_it_was(models: Models) -> None:
    weights, ids = opened_model(models("qwen3"))
    before = {name: (id(p), p.is_meta) for name, p in weights.model.named_parameters()}
    found = score(weights, ids, {paths(weights)[0]: [FOUR]})
    assert list(found.losses) == paths(weights)[:1]
    assert [tuple(path.rpartition(".")[2] for path in names) for names in found.sharing] == 2 * [
        ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    ]  # fmt: skip
    assert {name: (id(p), p.is_meta) for name, p in weights.model.named_parameters()} == before
    assert not any("forward" in vars(block) for block in weights.stack.blocks)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "modernbert"])
@pytest.mark.parametrize("method", ["fisher", "delta_loss"])
def test_more_bits_score_less_and_the_same_seed_the_same(family: str, method: Any, models: Models) -> None:
    weights, ids = opened_model(models(family))
    options: dict[str, Sequence[QuantSpec]] = dict.fromkeys(paths(weights), (TWO, FOUR, EIGHT))
    first, again = (score(weights, ids, options, method).losses for _ in range(2))
    assert first == again and list(first) == list(options)
    for path, (two, four, eight) in first.items():
        assert two > four > eight > 0, path
    if method == "fisher":  # a sum over tokens; delta_loss adds up absolute values of batches
        # In Gram space sums in another order turn a code of such small layers over, so nearest codes are compared.
        several = score(weights, ids, options, method, rounding="nearest").losses
        single = score(weights, ids, options, method, BackwardSettings(batch_size=1), "nearest").losses
        for path, values in several.items():
            assert single[path] == pytest.approx(values, rel=0.02), path


def test_fisher_scores_add_up_to_the_kl_of_the_quantized_model(sample_model: Path, calibration_text: Path) -> None:
    checkpoint = Checkpoint.open(sample_model)
    ids = torch.from_numpy(load_calibration(checkpoint, str(calibration_text), num_samples=6, sample_len=128).ids)
    weights = StreamedModel(checkpoint)
    spec = QuantSpec(4, 128)
    scores = score(weights, ids, dict.fromkeys(paths(weights), (spec,))).losses
    model = checkpoint.load_model()
    with torch.no_grad(), open_backward(weights, ids, BackwardSettings()) as run:
        run.forward()
        run.set_aside(sensitivity.fitted(len(ids)))
        ids = run.ids
        expected = torch.log_softmax(model(input_ids=ids).logits, -1)
        for index, prefix in enumerate(map(weights.stack.block_name, range(len(weights.stack.blocks)))):
            with weights.block(index, torch.device("cpu")) as block:
                for names, gram in run.input_sums(block, prefix).items():
                    own = {name: weight_of(model.get_submodule(name)) for name in names}
                    options = dict.fromkeys(names, (spec,))
                    for name, (error,) in sensitivity._errors_in_gram_space(own, options, gram).items():
                        own[name].sub_(error.float())
        found = torch.log_softmax(model(input_ids=ids).logits, -1)
    kl = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert sum(value for (value,) in scores.values()) == pytest.approx(kl, rel=0.2)


def test_layers_that_no_token_reached_get_the_mean_of_their_shape() -> None:
    shapes = {"a": (4, 8), "b": (4, 8), "c": (4, 8), "d": (8, 8)}
    found = sensitivity._fill_unseen({"a": [1.0, 0.5], "b": [3.0, 1.5], "c": None, "d": [9.0, 9.0]}, shapes)
    assert found["c"] == (2.0, 1.0)
    with pytest.raises(sensitivity.UnsupportedError, match="d: no token reaches it"):
        sensitivity._fill_unseen({"a": [1.0], "d": None}, shapes)


def test_nonsense_is_refused(models: Models) -> None:
    with pytest.raises(UsageError, match="known: fisher, delta_loss"):
        score(*opened_model(models("qwen3")), {}, "hessian")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="batch_size must be at least 1, not 0"):
        BackwardSettings(batch_size=0)
