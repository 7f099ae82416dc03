"""bfloat16 products: what they are, where they hold, and that a run with them is recorded, whole and repeatable."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from roundexport import TuneSettings, tune
from roundexport.errors import UsageError
from roundexport.formats.artifact import Artifact
from roundexport.kernels import gram_int8
from roundexport.model.bf16_linears import bfloat16_products, float32_products, in_hardware
from roundexport.model.block_call import capture_calls, first_hidden
from roundexport.model.blocks import linears, weight_of
from roundexport.model.channel_scaling import find_pairs
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.streamed_model import StreamedModel
from roundexport.tuning import job

Models = Callable[[str], Path]
CPU = torch.device("cpu")
IDS = torch.randint(2, 380, (3, 16), generator=torch.Generator().manual_seed(1))


def rounded(values: torch.Tensor) -> torch.Tensor:
    return values.bfloat16().float()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_product_is_that_of_rounded_inputs_and_weights(models: Models, name: str) -> None:
    weights = StreamedModel(Checkpoint.open(models(name)))
    with weights.block(0) as block, bfloat16_products(block):
        for module in linears(block).values():
            weight, bias = weight_of(module), module.bias
            hidden = torch.randn(2, 5, weight.shape[1], generator=torch.Generator().manual_seed(2))
            exact = rounded(hidden) @ rounded(weight).t()
            found = module(hidden) - (0 if bias is None else bias)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, exact, rtol=2**-7, atol=1e-4)
            assert not torch.equal(found, hidden @ weight.t())


def test_slopes_reach_inputs_and_weights(models: Models) -> None:
    weights = StreamedModel(Checkpoint.open(models("llama")), bfloat16=True)
    calls = _calls(weights)
    hidden = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    with weights.block(0) as block:
        own = {name: weight_of(m).clone().requires_grad_() for name, m in linears(block).items()}
        calls[0].run(block, hidden, own).square().sum().backward()
        lowered = [hidden.grad.clone(), *(w.grad.clone() for w in own.values())]
        for tensor in (hidden, *own.values()):
            tensor.grad = None
        with float32_products(block):
            calls[0].run(block, hidden, own).square().sum().backward()
        for found, exact in zip(lowered, (hidden.grad, *(w.grad for w in own.values())), strict=True):
            error = float((found - exact).norm() / exact.norm())
            assert 0 < error < 0.02


def test_blocks_are_themselves_again_and_copies_stay_lowered(models: Models) -> None:
    weights = StreamedModel(Checkpoint.open(models("llama")), bfloat16=True)
    hidden = torch.randn(1, 4, 64)
    with weights.block(0) as block:
        classes = {type(module) for module in linears(block).values()}
        twin = copy.deepcopy(block)
        name, module = next(iter(linears(twin).items()))
        expected = linears(block)[name](hidden)
        assert torch.equal(module(hidden), expected)
        weight_of(module).zero_()  # a copy has weights of its own
        assert torch.equal(linears(block)[name](hidden), expected)
        with float32_products(block):
            assert {type(module) for module in linears(block).values()} == {torch.nn.Linear}
        assert {type(module) for module in linears(block).values()} == classes != {torch.nn.Linear}
    assert {type(module) for module in linears(weights.stack.blocks[0]).values()} == {torch.nn.Linear}


def test_pairs_that_fold_are_found_in_float32(models: Models) -> None:
    path = models("llama")
    found = []
    for lowered in (False, True):
        weights = StreamedModel(Checkpoint.open(path), bfloat16=lowered)
        calls, distinct = _calls(weights), torch.unique(IDS)
        with weights.embedding(distinct, weights.rows(weights.embedding_name, distinct)):
            hidden = first_hidden(weights.model, weights.stack, IDS, 2)
        with weights.block(0) as block:
            found.append([pair.describe() for pair in find_pairs(block, calls[0], hidden[:1])])
    assert found[0] == found[1] != []


@pytest.mark.parametrize(
    "method",
    [
        {"algorithm": "gram"},
        {"algorithm": "signround", "steps": 10},
        {"finish": "end_to_end", "steps": 2},
        {"algorithm": "gram", "transform": "teq_noise"},
        {"algorithm": "signroundv2", "transform": "teq", "steps": 4},
        {"algorithm": "gram", "transform": "teq_model", "method_settings": ("teq_model.steps=4",)},
        {"finish": "end_to_end", "steps": 2, "method_settings": ("end_to_end.window=1",)},
        {"algorithm": "optimal_rtn", "target_bits": 3.5},
    ],
    ids=["gram", "signround", "end_to_end", "teq_noise", "teq", "teq_model", "windows", "mixed"],
)
def test_a_run_in_bfloat16_is_recorded_and_repeatable(
    models: Models, tmp_path: Path, method: dict[str, object]
) -> None:
    (tmp_path / "text").write_text("The sea was calm and the ship went on, and on, and on. " * 40)
    asked = {"group_size": 32, "calibration": str(tmp_path / "text"), "num_samples": 4, "sample_len": 16, **method}
    folders = [
        tune(models("llama"), tmp_path / f"{index}", TuneSettings(**asked, precision=precision), progress=False)
        for index, precision in enumerate(("bfloat16", "bfloat16", "float32"))
    ]
    opened = [Artifact.open(folder) for folder in folders]
    assert [artifact.manifest.algorithm["settings"]["precision"] for artifact in opened] == [
        "bfloat16",
        "bfloat16",
        "float32",
    ]
    files = [sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors") for folder in folders]
    assert files[0] == files[1] == files[2] != []
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in files[0])
    assert any((folders[0] / name).read_bytes() != (folders[2] / name).read_bytes() for name in files[0])


def test_auto_follows_the_device(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (False, True):
        monkeypatch.setattr(job, "in_hardware", lambda device, has=has: has)
        made = job.Job.of(models("llama"), TuneSettings(group_size=32))
        assert made.weights.bfloat16 is has
        assert made.key()["precision"] == ("bfloat16" if has else "float32")
    assert not job.Job.of(models("llama"), TuneSettings(group_size=32, precision="float32")).weights.bfloat16


def test_a_run_says_that_it_multiplies_in_bfloat16(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("The sea was calm. " * 40)
    asked = {"group_size": 32, "calibration": str(tmp_path / "text"), "num_samples": 2, "sample_len": 16}
    for precision in ("bfloat16", "float32"):
        tune(models("llama"), tmp_path / precision, TuneSettings(**asked, precision=precision))
        assert ("products in bfloat16" in capsys.readouterr().err) is (precision == "bfloat16")


def test_hardware_is_what_the_processor_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, expected in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_f": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        assert in_hardware(CPU) is expected


def test_other_classes_keep_float32_and_an_error_leaves_nothing_behind() -> None:
    class Own(torch.nn.Linear):
        pass

    block = torch.nn.Sequential(Own(4, 4), torch.nn.Linear(4, 4))
    with pytest.raises(ZeroDivisionError), bfloat16_products(block):
        assert type(block[0]) is Own and type(block[1]) is not torch.nn.Linear
        raise ZeroDivisionError
    assert [type(module) for module in block] == [Own, torch.nn.Linear]


def test_a_run_without_data_is_the_same_on_any_machine(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "in_hardware", lambda device: True)
    made = job.Job.of(models("llama"), TuneSettings(group_size=32, recipe="rtn"))
    assert made.key()["precision"] == "float32"


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UsageError, match="precision must be auto, float32 or bfloat16, not 'float16'"):
        TuneSettings(precision="float16")  # type: ignore[arg-type]


def _calls(weights: StreamedModel):
    distinct = torch.unique(IDS)
    rows = weights.rows(weights.embedding_name, distinct)
    with weights.embedding(distinct, rows), weights.streamed_forward():
        return capture_calls(weights.model, weights.stack, IDS)


def test_what_onednn_was_told_not_to_use_is_not_in_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    has = {"avx512_bf16": True, "avx512_vnni": True, "amx_bf16": True, "amx_int8": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    expected = {"AVX2": (False, False), "avx512_core_vnni": (False, True), "AVX512_CORE_BF16": (True, True),
                "AVX512_CORE_AMX": (True, True), "": (True, True)}  # fmt: skip
    for limit, (bfloat16, eight_bit) in expected.items():
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert in_hardware(CPU) is bfloat16, limit
        assert (gram_int8.available() is None) is eight_bit, limit
