"""Which tokens an expert of a layer is fitted to, and that a block of experts is tuned stage by stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from roundexport.algorithms.common import open_block
from roundexport.algorithms.common.expert_tokens import ExpertTokens
from roundexport.algorithms.interface import BlockInputs
from roundexport.algorithms.rounding import gram, optimal_rtn, rtn, signround
from roundexport.errors import UsageError
from roundexport.model.block_call import capture_calls, first_hidden, run_all
from roundexport.model.blocks import find_stack, linears, weight_of
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.staged_forward import find_stages
from roundexport.quant.spec import QuantSpec

WIDTH = 8


def layer(chosen: list[list[int]], shares: list[list[float]], mask: torch.Tensor) -> ExpertTokens:
    """Two batches of one sample each, token t with the values t and t + 100."""
    count = len(chosen)
    tokens = torch.arange(count, dtype=torch.float32)[:, None].expand(count, WIDTH)
    index, share, half = torch.tensor(chosen), torch.tensor(shares), count // 2
    calls = [
        ((tokens[part], index[part], share[part]), (tokens[part] + 100, index[part], share[part]))
        for part in (slice(0, half), slice(half, None))
    ]
    return ExpertTokens(calls, mask)


def test_an_expert_gets_its_own_tokens_weighted_by_the_square_of_its_share() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    found = layer([[0, 1], [1, 2], [1, 0], [2, 1], [2, 0], [1, 0]], [[0.8, 0.2]] * 5 + [[0.4, 0.6]], mask).of(1)
    assert found.quantized[:, 0].tolist() == [0, 1, 3, 5]  # token 2 does not count
    assert found.floats[:, 0].tolist() == [100, 101, 103, 105]
    assert found.samples.tolist() == [0, 0, 1, 1]
    squares = torch.tensor([0.2, 0.8, 0.2, 0.4]).square()
    torch.testing.assert_close(found.weights, squares / squares.mean())
    assert (found.own, found.few) == (4, False)


@pytest.mark.parametrize(("own", "spread"), [(1, [0.0, 3.0]), (0, [0.0, 5.0])])
def test_others_stand_in_where_few_tokens_come(own: int, spread: list[float]) -> None:
    chosen = [[0], [0], [0], [1 if own else 0], [0], [0]]
    found = layer(chosen, [[1.0]] * 6, torch.ones(2, 3)).of(1)
    assert found.few and found.own == own
    assert found.quantized[:, 0].tolist() == spread  # a quarter of the width are enough
    assert found.weights.tolist() == ([0.25, 1.0] if own else [0.25, 0.25])


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory):
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        shared_expert_intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.Qwen2MoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.25)
        # The last expert of the first layer is never chosen.
        model.model.layers[0].mlp.gate.weight[3] = 0
        model.model.layers[0].post_attention_layernorm.weight.fill_(1.0)
    folder: Path = tmp_path_factory.mktemp("moe")
    model.save_pretrained(folder)
    loaded = Checkpoint.open(folder).load_model().requires_grad_(False)
    stack = find_stack(loaded)
    ids = torch.randint(2, 60, (16, 24), generator=torch.Generator().manual_seed(1))
    call, hidden = capture_calls(loaded, stack, ids)[0], first_hidden(loaded, stack, ids, 4)
    target = run_all(stack.blocks[0], call, hidden, 4, torch.device("cpu"))
    return stack.blocks[0], BlockInputs(call, hidden, hidden.clone(), target, torch.ones(16, 24))


def specs(block: torch.nn.Module) -> dict[str, QuantSpec]:
    return {name: QuantSpec(3, 32, False) for name in linears(block) if not name.endswith("gate")}


def error(block, inputs: BlockInputs, layers) -> float:
    weights = {name: torch.from_numpy(linear.dequantize()) for name, linear in layers.items()}
    out = run_all(block, inputs.call, inputs.quantized_inputs, 4, torch.device("cpu"), weights)
    return float((out - inputs.target).square().mean())


def test_experts_of_a_layer_are_one_stage(block) -> None:
    module, inputs = block
    stages = find_stages(module, inputs.call, inputs.float_inputs[:1])
    assert [len(stage) for stage in stages if "mlp.experts.0.gate_proj" in stage] == [12]
    assert sorted(name for stage in stages for name in stage) == sorted(linears(module))


@pytest.mark.parametrize("keep", [True, False])
def test_gram_sums_per_expert_beat_rounding_to_nearest(block, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = block
    monkeypatch.setattr(open_block, "_fits", lambda *_: keep)
    nearest = rtn.tune_block(module, None, specs(module), rtn.RtnSettings())
    found = gram.tune_block(module, inputs, specs(module), gram.GramSettings())
    assert list(found.layers) == list(specs(module))
    assert error(module, inputs, found.layers) < 0.5 * error(module, inputs, nearest.layers)
    assert found.note == "" or "by few tokens" in found.note
    if not keep:
        again = gram.tune_block(module, inputs, specs(module), gram.GramSettings())
        assert all(found.layers[name].equals(again.layers[name]) for name in found.layers)


def test_light_weighs_by_each_experts_inputs(block) -> None:
    module, inputs = block
    nearest = rtn.tune_block(module, None, specs(module), rtn.RtnSettings())
    found = optimal_rtn.tune_block(module, inputs, specs(module), optimal_rtn.OptimalRtnSettings())
    assert error(module, inputs, found.layers) < error(module, inputs, nearest.layers)


def test_an_expert_that_no_token_reaches_is_rounded_and_told(block) -> None:
    module, inputs = block
    few = BlockInputs(
        inputs.call, inputs.quantized_inputs[:1], inputs.float_inputs[:1], inputs.target[:1], torch.zeros(1, 24)
    )
    few.mask[0, 0] = 1
    found = gram.tune_block(module, few, specs(module), gram.GramSettings())
    assert found.note == "4 of 4 experts are reached by few tokens, 2 by none: other tokens stand in"
    light = optimal_rtn.tune_block(module, few, specs(module), optimal_rtn.OptimalRtnSettings())
    assert light.note == "3 of 4 experts are reached by few tokens"
    weight = weight_of(linears(module)["mlp.experts.3.down_proj"]).numpy()
    assert np.corrcoef(found.layers["mlp.experts.3.down_proj"].dequantize().ravel(), weight.ravel())[0, 1] > 0.9


def test_sign_steps_on_experts(block) -> None:
    module, inputs = block
    with pytest.raises(UsageError, match="not made for mixtures of experts"):
        gram.tune_block(module, inputs, specs(module), gram.GramSettings(steps=2))
    found = signround.tune_block(module, inputs, specs(module), signround.SignRoundSettings(steps=4))
    assert found.loss_after is not None and found.loss_before is not None and found.loss_after <= found.loss_before
