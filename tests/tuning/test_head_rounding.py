"""The table that lm_head reads, at 4 bits: rounded for what enters it, by every run that can, to the same bytes."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tuning_tools import QUICK, Models

from conftest import tuned
from roundexport.algorithms.common.error_compensation import InputSums
from roundexport.algorithms.common.latent_codes import pack
from roundexport.algorithms.rounding._gram_head import HeadRounder
from roundexport.algorithms.rounding._gram_problem import Problem
from roundexport.algorithms.rounding._gram_weight import round_rows
from roundexport.algorithms.rounding.gram import GramSettings
from roundexport.errors import UnsupportedError
from roundexport.formats.artifact import Artifact
from roundexport.kernels import round_to_nearest
from roundexport.model.blocks import linears
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.head_inputs import head_gram
from roundexport.model.streamed_model import StreamedModel
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec
from roundexport.tuning import block_loop, head_rounding

GRAM: dict[str, Any] = {**QUICK, "algorithm": "gram", "steps": None}
HEADS = {"llama": "lm_head", "qwen3": "model.embed_tokens"}  # one of its own, and one tied to the embedding


def lost(linear: QuantizedLinear, weight: torch.Tensor, gram: torch.Tensor) -> float:
    error = torch.from_numpy(linear.dequantize()).float() - weight
    return float(((error @ gram) * error).sum())


@pytest.mark.parametrize("family", HEADS)
def test_what_enters_the_head_is_what_the_whole_model_hands_it(models: Models, family: str) -> None:
    checkpoint = Checkpoint.open(models(family))
    ids = torch.randint(3, 60, (5, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(5, 16)
    mask[:, -1] = 0
    seen: list[torch.Tensor] = []
    model = checkpoint.load_model()
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[operator]
    with torch.no_grad():
        model(input_ids=ids)
    x = seen[0][:, :-1].flatten(0, 1)
    weights = StreamedModel(checkpoint)
    torch.testing.assert_close(head_gram(weights, ids, mask, 2), x.t() @ x, rtol=1e-4, atol=1e-4)
    short = StreamedModel(checkpoint, bfloat16=True)
    found = head_gram(short, ids, mask, 2)
    assert 0 < (found - x.t() @ x).norm() < 0.05 * found.norm()
    assert all(type(module) is torch.nn.Linear for module in linears(short.stack.blocks[0]).values())


@pytest.mark.parametrize("family", HEADS)
def test_at_4_bits_the_heads_table_loses_less_and_others_are_rounded_to_nearest(
    models: Models, calibration_text: Path, tmp_path: Path, family: str
) -> None:
    asked = {**GRAM, "calibration": str(calibration_text), "embedding_bits": 4}
    artifact = Artifact.open(tuned(models(family), tmp_path / "out", **asked))
    checkpoint = Checkpoint.open(models(family))
    weights, spec = checkpoint.load_model(), QuantSpec(4, 32, True)
    ids = torch.randint(3, 60, (8, 32), generator=torch.Generator().manual_seed(1))
    gram = head_gram(StreamedModel(checkpoint), ids, torch.ones(8, 32), 4)
    tables = {"model.embed_tokens", HEADS[family]}
    for name in tables:
        weight = weights.get_parameter(f"{name}.weight").detach().float()
        nearest = round_to_nearest.run(weight, spec)
        if name == HEADS[family]:
            assert lost(artifact.linear(name), weight, gram) < 0.8 * lost(nearest, weight, gram)
        else:
            assert artifact.linear(name).equals(nearest)


@pytest.mark.parametrize("changes", [{"embedding_bits": 8}, {"embedding_bits": 4, "algorithm": "optimal_rtn"}])
def test_at_8_bits_and_by_other_methods_it_is_rounded_to_nearest(
    models: Models, calibration_text: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    asked = {**GRAM, "calibration": str(calibration_text), **changes}
    artifact = Artifact.open(tuned(models("llama"), tmp_path / "out", **asked))
    weight = Checkpoint.open(models("llama")).load_model().get_parameter("lm_head.weight").detach()
    spec = QuantSpec(changes["embedding_bits"], 32, True)
    assert artifact.linear("lm_head").equals(round_to_nearest.run(weight, spec))


def test_of_short_samples_it_sees_as_many_more(
    models: Models, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def look(weights: StreamedModel, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(ids))
        return head_gram(weights, ids, *rest)

    monkeypatch.setattr(head_rounding, "head_gram", look)
    asked = {**GRAM, "calibration": str(calibration_text), "embedding_bits": 4, "num_samples": 40, "sample_len": 16}
    tuned(models("llama"), tmp_path / "out", **asked)
    assert seen == [40]  # 640 tokens; 32 samples of 512 would be 16,384


def test_rows_in_parts_are_the_rows_of_the_whole() -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(2))
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(3))
    rounds, spec = HeadRounder(x.t() @ x, 0.3, GramSettings().effort()), QuantSpec(4, 32, True)
    whole = rounds(weight, spec)
    parts = [rounds(weight[start : start + 16], spec) for start in range(0, 48, 16)]
    assert QuantizedLinear.concatenate_rows(parts).equals(whole)


def test_rows_are_those_of_a_stage_that_has_nothing_to_repair() -> None:
    weight = torch.randn(32, 640, generator=torch.Generator().manual_seed(4))
    x = torch.randn(900, 640, generator=torch.Generator().manual_seed(5))
    gram, effort, spec = x.t() @ x, GramSettings().effort(), QuantSpec(4, 32, True)
    problem = Problem.of([InputSums(gram.clone(), torch.zeros_like(gram))], (), 0.3)
    rows = round_rows(weight, spec, problem.tensors(), effort)
    whole = pack(spec, rows.centered_codes(), rows.scale, rows.zero_point)
    assert HeadRounder(gram, 0.3, effort)(weight, spec).equals(whole)


def test_what_rounds_a_head_is_gone_when_blocks_begin(
    models: Models, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[HeadRounder]] = []
    there: list[list[HeadRounder | None]] = []
    begin, original = HeadRounder.__init__, block_loop.run_task

    def begun(self: HeadRounder, *args: Any) -> None:
        made.append(weakref.ref(self))
        begin(self, *args)

    def run_task(*args: Any) -> Any:
        there.append([one() for one in made])
        return original(*args)

    monkeypatch.setattr(HeadRounder, "__init__", begun)
    monkeypatch.setattr(block_loop, "run_task", run_task)
    tuned(models("llama"), tmp_path / "out", **{**GRAM, "calibration": str(calibration_text), "embedding_bits": 4})
    assert there and all(found == [None] for found in there), "its sums stay in memory for all blocks"


def test_a_head_that_is_no_module_is_refused(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = StreamedModel(Checkpoint.open(models("llama")))
    monkeypatch.setattr(weights.model, "get_output_embeddings", lambda: torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match="--embedding-bits 8"):
        head_gram(weights, torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4), 1)
