"""Walking a block in stages: the stages, what waits there, and that the numbers are those of a plain forward."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import FAMILIES
from roundexport.algorithms.interface import BlockInputs
from roundexport.algorithms.rounding import gram
from roundexport.errors import UnsupportedError
from roundexport.families.configurations import families
from roundexport.families.toy import write_model
from roundexport.model import staged_forward
from roundexport.model.block_call import capture_calls, first_hidden, run_all
from roundexport.model.blocks import find_stack, linears, weight_of
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.residual_writers import find_writers
from roundexport.model.staged_forward import StagedForward, find_stages
from roundexport.quant.spec import QuantSpec

Models = Callable[[str], Path]
CPU = torch.device("cpu")
IDS = torch.randint(2, 380, (5, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def block(models: Models, tmp_path: Path, request: pytest.FixtureRequest):
    family = getattr(request, "param", "llama")
    if family not in FAMILIES:
        write_model(families()[family], tmp_path)
    model = Checkpoint.open(models(family) if family in FAMILIES else tmp_path).load_model().requires_grad_(False)
    stack = find_stack(model)
    return stack.blocks[0], capture_calls(model, stack, IDS)[0], first_hidden(model, stack, IDS, 2)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("llama", [3, 1, 2, 1]),
        ("phi3", [1, 1, 1, 1]),
        ("gpt2", [1, 1, 1, 1]),
        ("bert", [3, 1, 1, 1]),
    ],
    indirect=["block"],
)
def test_linears_that_share_an_input_are_one_stage(block, expected: list[int]) -> None:
    module, call, hidden = block
    stages = find_stages(module, call, hidden[:1])
    assert [len(stage) for stage in stages] == expected
    assert sorted(name for stage in stages for name in stage) == sorted(linears(module))


@pytest.mark.parametrize("keep", [True, False])
def test_inputs_are_those_of_a_forward_with_the_weights_so_far(block, keep: bool) -> None:
    module, call, floats = block
    quantized = floats + 0.01 * torch.randn(floats.shape)
    changed = {name: torch.randn(m.weight.shape) * 0.1 for name, m in linears(module).items()}
    seen: dict[str, torch.Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, args: seen.update({name: args[0]})

    with StagedForward(module, call, quantized, floats, 2, CPU, keep) as walk:
        so_far: dict[str, torch.Tensor] = {}
        for index, stage in enumerate(walk.stages):
            pairs = list(walk.inputs(index))
            handle = linears(module)[stage[0]].register_forward_pre_hook(note(stage[0]))
            for side, hidden, weights in ((0, quantized, so_far), (1, floats, {})):
                seen.clear()
                call.run(module, hidden, weights)
                assert torch.allclose(torch.cat([pair[side] for pair in pairs]), seen[stage[0]], atol=1e-5)
            handle.remove()
            for name in stage:
                so_far[name] = changed[name]
                walk.replace(name, changed[name])
        outputs = torch.empty_like(floats), torch.empty_like(floats)
        walk.outputs(*outputs)
    assert torch.allclose(outputs[0], run_all(module, call, quantized, 2, CPU, changed), atol=1e-5)
    assert torch.allclose(outputs[1], run_all(module, call, floats, 2, CPU), atol=1e-5)
    assert not torch.equal(linears(module)[walk.stages[0][0]].weight, changed[walk.stages[0][0]])


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("llama", ("self_attn.o_proj", "mlp.down_proj")),
        ("gpt2", ("attn.c_proj", "mlp.c_proj")),
        ("opt", ("self_attn.out_proj", "fc2")),
        ("gptj", ("attn.out_proj", "mlp.fc_out")),  # side by side
        ("deepseek_v2", ("self_attn.o_proj", "mlp.down_proj")),  # and queries as wide as these
        ("mixtral", ()),  # experts
        ("mamba2", ("mixer.out_proj",)),
        ("bert", ()),  # a norm behind each
    ],
    indirect=["block"],
)
def test_what_writes_to_the_residual_stream(block, expected: tuple[str, ...]) -> None:
    module, call, hidden = block
    assert find_writers(module, call, hidden[:1], find_stages(module, call, hidden[:1])) == expected


def test_a_block_that_scales_what_it_adds_has_no_writers(block) -> None:
    module, call, hidden = block
    module.mlp.register_forward_hook(lambda _, __, output: 0.5 * output)
    assert find_writers(module, call, hidden[:1], find_stages(module, call, hidden[:1])) == ()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("block", ["llama", "opt"], indirect=True)
def test_the_error_of_the_residual_stream_where_a_linear_adds_to_it(block, keep: bool) -> None:
    module, call, floats = block
    quantized = floats + 0.01 * torch.randn(floats.shape)
    errors: list[list[torch.Tensor | None]] = []
    with StagedForward(module, call, quantized, floats, 2, CPU, keep) as walk:
        writers = find_writers(module, call, floats[:1], walk.stages)
        for index, stage in enumerate(walk.stages):
            errors.append(
                [walk.residual_error(index, start) for start, _ in zip((0, 2, 4), walk.inputs(index), strict=True)]
            )
            for name in stage:
                walk.replace(name, 1.1 * weight_of(linears(module)[name]))
            if stage == writers[:1]:
                before = {name: walk.rounded(name).clone() for done in walk.stages[: index + 1] for name in done}
        stages = dict(zip(walk.stages, errors, strict=True))
    assert [name for (name, *_), found in stages.items() if found[0] is not None] == list(writers)
    first, second = (torch.cat(stages[(name,)]) for name in writers)
    assert torch.equal(first, floats - quantized)

    def written(hidden: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        outputs: list[torch.Tensor] = []
        note = linears(module)[writers[0]].register_forward_hook(lambda _, __, output: outputs.append(output))
        call.run(module, hidden, weights)
        note.remove()
        return hidden + outputs[0].reshape(hidden.shape)

    assert torch.allclose(second, written(floats, {}) - written(quantized, before), atol=1e-5)


def test_a_walk_that_is_given_up_frees_what_waits(block) -> None:
    module, call, hidden = block
    waiting = []
    with pytest.raises(KeyboardInterrupt), StagedForward(module, call, hidden, hidden, 2, CPU) as walk:
        for quantized, _ in walk.inputs(0):
            waiting.append(weakref.ref(quantized))
        del quantized
        assert any(ref() is not None for ref in waiting)
        raise KeyboardInterrupt
    gc.collect()
    assert all(ref() is None for ref in waiting)
    assert torch.is_grad_enabled()


def test_an_error_in_the_forward_is_raised_where_the_batch_is_asked_for(block) -> None:
    module, call, hidden = block
    with StagedForward(module, call, hidden[..., :-1], hidden, 2, CPU) as walk, pytest.raises(RuntimeError):
        list(walk.inputs(0))


def test_a_linear_that_runs_twice_is_refused(block) -> None:
    module, call, hidden = block
    module.mlp.up_proj = module.mlp.gate_proj
    with pytest.raises(UnsupportedError, match="runs 2 times"):
        find_stages(module, call, hidden[:1])


def test_running_again_gives_the_same_bits_without_greenlets(block, monkeypatch: pytest.MonkeyPatch) -> None:
    module, call, floats = block
    quantized = floats + 0.01 * torch.randn(floats.shape, generator=torch.Generator().manual_seed(2))

    def seen(keep: bool) -> list[torch.Tensor]:
        outputs = [torch.empty_like(floats), torch.empty_like(floats)]
        inputs = []
        with StagedForward(module, call, quantized, floats, 2, CPU, keep) as walk:
            for index, stage in enumerate(walk.stages):
                inputs += [side.clone() for pair in walk.inputs(index) for side in pair]
                for name in stage:
                    walk.replace(name, weight_of(linears(module)[name]).round(decimals=2))
            walk.outputs(*outputs)
        return inputs + outputs

    kept = seen(True)
    monkeypatch.setattr(staged_forward, "_Run", None)
    again = seen(False)
    assert len(kept) == len(again) > 2 and all(map(torch.equal, kept, again))


def test_a_linear_whose_weight_is_only_read_is_in_no_stage_and_kept_float(tmp_path: Path) -> None:
    write_model(families()["mamba"], tmp_path)
    model = Checkpoint.open(tmp_path).load_model().requires_grad_(False)
    stack, spec = find_stack(model), QuantSpec(8, 32)
    call, hidden = capture_calls(model, stack, IDS)[0], first_hidden(model, stack, IDS, 2)
    stages = find_stages(stack.blocks[0], call, hidden[:1])
    assert stages == (("mixer.in_proj",), ("mixer.x_proj",), ("mixer.out_proj",))
    inputs = BlockInputs(call, hidden, hidden, hidden, torch.ones(IDS.shape))
    names = [name for stage in stages for name in stage]
    assert (
        list(gram.tune_block(stack.blocks[0], inputs, dict.fromkeys(names, spec), gram.GramSettings()).layers) == names
    )
    with pytest.raises(UnsupportedError, match=r"mixer\.dt_proj never runs in a forward of its block"):
        gram.tune_block(stack.blocks[0], inputs, {"mixer.dt_proj": spec}, gram.GramSettings())
