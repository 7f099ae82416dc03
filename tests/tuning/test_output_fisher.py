"""What an error of each output costs: sums as autograd has them, kept by a run; who cannot have them is told."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tuning_tools import QUICK, Models, contents

from conftest import tuned
from roundexport.algorithms import parts
from roundexport.algorithms.interface import BlockInputs
from roundexport.algorithms.rounding import gram
from roundexport.errors import Interrupted, RoundexportError, UnsupportedError, UsageError, WontFitError
from roundexport.formats.artifact import Artifact
from roundexport.kernels import cholesky, two_sided
from roundexport.model.blockwise_backward import BackwardSettings
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.streamed_model import StreamedModel
from roundexport.schemes.layer_plan import make_plan
from roundexport.tuning import output_fisher, run
from roundexport.tuning.settings import TuneSettings

GRAM: dict[str, Any] = {**QUICK, "algorithm": "gram", "steps": None, "bits": 2}
ASKED = {**GRAM, "method_settings": ("gram.fisher_samples=4",)}


def measured(checkpoint: Checkpoint, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """S of every linear in the blocks, by path."""
    weights = StreamedModel(checkpoint)
    rows = {
        name: module.out_features
        for name, module in weights.model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    found: dict[str, torch.Tensor] = {}

    def write(index: int, sums: Any) -> None:
        found.update({f"model.layers.{index}.{name}": value for name, value in sums.items()})

    output_fisher.measure(weights, ids, rows, BackwardSettings(batch_size=2), write)
    assert set(found) == set(rows)
    return found


def drawn(logits: torch.Tensor) -> torch.Tensor:
    """Labels as the measure draws them: one sample after the other."""
    generator = torch.Generator().manual_seed(BackwardSettings().seed)
    logs = torch.log_softmax(logits[:, :-1].float(), -1)
    return torch.stack([torch.multinomial(own.exp(), 1, generator=generator)[:, 0] for own in logs])


def test_sums_are_those_of_autograd(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    model = checkpoint.load_model()
    ids = torch.randint(0, model.config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(1))
    outputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
    logits = model(input_ids=ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), drawn(logits).flatten(), reduction="sum")
    expected = {}
    for name, gradient in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
        late = gradient[:, 1:].flatten(0, 1)  # a decoder's first token counts for nothing
        size = late.norm(dim=1, keepdim=True)
        expected[name] = late.t() @ (late / size.clamp(min=1e-30))
    whole = measured(checkpoint, ids)
    for name, sums in expected.items():
        torch.testing.assert_close(whole[name], sums, rtol=2e-3, atol=float(sums.abs().max()) * 1e-4)
    monkeypatch.setattr(
        parts, "MOST_FISHER_ROWS", 16
    )  # of weights with more rows, parts that know nothing of each other
    for name, found in measured(checkpoint, ids).items():
        own = [found[part.start : part.stop, : len(part)] for part in parts.fisher_parts(len(found))]
        assert len(own) == -(-len(found) // 16)
        for part, square in zip(parts.fisher_parts(len(found)), own, strict=True):
            assert torch.equal(square, whole[name][part.start : part.stop, part.start : part.stop])


def test_experts_are_left_out(models: Models) -> None:
    weights = StreamedModel(Checkpoint.open(models("mixtral")))
    plan = make_plan(weights.model, TuneSettings(group_size=32).schemes, weights.all_row_chunks())
    found = output_fisher.rows_of(plan)
    assert {path.rpartition(".")[2] for path in found} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert any(".experts." in info.name for info, _ in plan.layers)


def test_what_it_holds_and_writes_is_refused_where_it_does_not_fit(
    models: Models, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**ASKED, "calibration": str(calibration_text)}
    with monkeypatch.context() as patch:
        patch.setattr("roundexport.environment.memory.memory_limit", lambda: 1 << 20)
        patch.setattr(run, "load_calibration", None)  # it is refused before any text is written
        with pytest.raises(WontFitError, match=r"measuring what errors of outputs cost takes .* GiB of memory"):
            tuned(models("llama"), tmp_path / "out", **asked)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(run, "measure_outputs", None)  # it is refused before the work
    with pytest.raises(
        WontFitError, match=r"the run takes .* GiB of disk .*hidden states.*what errors of outputs cost.*default"
    ):
        tuned(models("llama"), tmp_path / "out", **asked)


@pytest.mark.parametrize(("enough", "told"), [(193, True), (192, False)])
def test_sums_of_few_tokens_are_told(
    models: Models,
    calibration_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    enough: int,
    told: bool,
) -> None:
    def seen(*_: Any) -> None:
        raise _SeenError

    monkeypatch.setattr(run, "ENOUGH_TOKENS", enough)
    monkeypatch.setattr(run, "measure_outputs", seen)
    asked = {**GRAM, "method_settings": ("gram.fisher_samples=32",), "calibration": str(calibration_text)}
    with pytest.raises(_SeenError):
        tuned(models("llama"), tmp_path / "out", **{**asked, "progress": True})
    said = " ".join(capsys.readouterr().err.split())
    assert ("on 192 tokens; of fewer than 193 it may be worse than not known" in said) == told


def test_a_run_goes_on_from_its_sums(
    models: Models, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**ASKED, "calibration": str(calibration_text)}
    expected = contents(tuned(models("llama"), tmp_path / "expected", **asked))
    assert expected != contents(tuned(models("llama"), tmp_path / "alone", **{**asked, "method_settings": ()}))

    def press(*args: Any) -> Any:
        raise KeyboardInterrupt

    def kept() -> list[str]:
        return sorted(path.name for path in (tmp_path / "out.partial").glob("fisher-*"))

    with monkeypatch.context() as patch:
        patch.setattr(gram, "_walk", press)
        with pytest.raises(Interrupted):
            tuned(models("llama"), tmp_path / "out", **asked)
    assert kept() == ["fisher-00000.safetensors", "fisher-00001.safetensors"]
    monkeypatch.setattr(run, "measure_outputs", press)  # nothing is measured twice
    shutil.copy(tmp_path / "out.partial" / "fisher-00000.safetensors", tmp_path / "spent")
    walk = gram._walk
    walks = iter([walk, press])

    def one_block(*args: Any) -> Any:
        return next(walks)(*args)

    with monkeypatch.context() as patch:  # and in the second block; what the first one needed is gone
        patch.setattr(gram, "_walk", one_block)
        with pytest.raises(Interrupted):
            tuned(models("llama"), tmp_path / "out", **asked)
    assert kept() == ["fisher-00001.safetensors"]
    shutil.copy(tmp_path / "spent", tmp_path / "out.partial" / "fisher-00000.safetensors")  # killed before it was gone

    def looked(*args: Any) -> Any:
        assert kept() == ["fisher-00001.safetensors"]
        return walk(*args)

    monkeypatch.setattr(gram, "_walk", looked)
    assert contents(tuned(models("llama"), tmp_path / "out", **asked)) == expected


class _SeenError(Exception):
    """Ends a run once its first block's problem was seen."""


def first_problem(
    monkeypatch: pytest.MonkeyPatch, model: Path, out: Path, **asked: Any
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters and S of the first block as the rounding method gets them."""
    found: list[dict[str, torch.Tensor]] = []

    def look(block: torch.nn.Module, inputs: BlockInputs, *_: Any) -> Any:
        found.extend(({name: p.detach().clone() for name, p in block.named_parameters()}, dict(inputs.fisher)))
        raise _SeenError

    with monkeypatch.context() as patch:
        patch.setattr(gram, "_walk", look)
        with pytest.raises(_SeenError):
            tuned(model, out, **asked)
    return found[0], found[1]


def test_a_transform_of_rows_is_taken_out_of_them(
    models: Models, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "MOST_FISHER_ROWS", 32)  # several parts
    asked = {**ASKED, "calibration": str(calibration_text)}
    weights, plain = first_problem(monkeypatch, models("llama"), tmp_path / "plain", **asked)
    folded, behind = first_problem(
        monkeypatch, models("llama"), tmp_path / "folded", **asked, transform="activation_smoothing"
    )
    columns = (weights["input_layernorm.weight"] / folded["input_layernorm.weight"])[None]  # those of the values
    rows = (folded["self_attn.v_proj.weight"] / weights["self_attn.v_proj.weight"] / columns).median(1).values
    assert float(rows.log().std()) > 0.01
    for name, sums in behind.items():
        if name not in ("self_attn.v_proj", "mlp.up_proj"):  # nothing divides the rows of others
            assert torch.equal(sums, plain[name])
    for part in parts.fisher_parts(len(rows)):
        own = slice(part.start, part.stop)
        expected = plain["self_attn.v_proj"][own, : len(part)] / (rows[own, None] * rows[own])
        torch.testing.assert_close(behind["self_attn.v_proj"][own, : len(part)], expected, rtol=1e-3, atol=1e-12)


def test_a_plan_of_bits_is_the_same_and_its_rows_look_at_each_other(
    models: Models, calibration_text: Path, tmp_path: Path
) -> None:
    planned = {**ASKED, "calibration": str(calibration_text), "bits": 4, "target_bits": 6.5, "choices": (4, 8)}
    found = Artifact.open(tuned(models("llama"), tmp_path / "found", **planned))
    alone = Artifact.open(tuned(models("llama"), tmp_path / "alone", **{**planned, "method_settings": ()}))
    specs = {name: found.entry(name).spec for name in found.names()}
    assert {spec.bits for name, spec in specs.items() if ".layers." in name} == {4, 8}
    assert specs == {name: alone.entry(name).spec for name in alone.names()}
    for bits in (4, 8):  # both widths are rounded so
        names = [name for name, spec in specs.items() if spec.bits == bits and ".layers." in name]
        assert any((found.linear(name).codes != alone.linear(name).codes).any() for name in names)


def test_an_encoder_has_them_too(models: Models, calibration_text: Path, tmp_path: Path) -> None:
    asked = {**ASKED, "calibration": str(calibration_text)}
    found = contents(tuned(models("bert"), tmp_path / "found", **asked))
    assert found != contents(tuned(models("bert"), tmp_path / "alone", **{**asked, "method_settings": ()}))


@pytest.mark.parametrize(
    ("model", "changes", "kind", "words"),
    [
        ("t5, one block", {}, UnsupportedError, "gram.fisher_samples is for models of text"),
        ("llama", {"method_settings": ("gram.fisher_samples=-1",)}, UsageError, "fisher_samples must be at least 0"),
        (
            "llama",
            {"method_settings": ("gram.fisher_damping=0.0009",)},
            UsageError,
            "fisher_damping must be at least 0.001",
        ),
    ],
)
def test_who_cannot_have_them_is_told(
    model: str, changes: dict[str, Any], kind: type[Exception], words: str, models: Models, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=words):
        tuned(models(model), tmp_path / "out", **{**ASKED, **changes})
    assert not list(tmp_path.iterdir())


def test_the_least_damping_is_enough_for_a_single_token() -> None:
    gradient = torch.randn(1, parts.MOST_FISHER_ROWS, generator=torch.Generator().manual_seed(0))
    damped = two_sided.damped(gradient.t() @ gradient, gram.GramSettings(fisher_damping=1e-3).fisher_damping)
    assert damped is not None and bool(torch.isfinite(cholesky.run(damped)).all())


def test_gradients_that_are_not_numbers_are_refused(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    monkeypatch.setattr(output_fisher.torch, "isfinite", lambda value: torch.zeros_like(value, dtype=torch.bool))
    with pytest.raises(RoundexportError, match=r"gradients of model\.layers\.1\..* are not finite"):
        measured(checkpoint, torch.zeros(2, 8, dtype=torch.long))
