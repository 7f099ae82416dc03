"""Token embedding and lm_head are scored by what rounding them does to the whole model, and a plan chooses for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from roundexport import TuneSettings, tune
from roundexport.errors import UsageError
from roundexport.formats.artifact import Artifact
from roundexport.kernels import round_to_nearest
from roundexport.model.blockwise_backward import BackwardSettings
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.head_inputs import head_gram
from roundexport.model.streamed_model import StreamedModel
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.schemes import allocate, sensitivity
from roundexport.schemes.allocate import BitAllocation
from roundexport.schemes.gram_space import GramSpace
from roundexport.schemes.kernel_timing import Product
from roundexport.schemes.layer_plan import make_plan
from roundexport.schemes.sensitivity import Scores, fitted
from roundexport.schemes.table_scores import Tables

Models = Callable[[str], Path]
FOUR, EIGHT = QuantSpec(4, 32), QuantSpec(8, 32)
EMBEDDING, HEAD = LinearInfo("model.embed_tokens", 64, 384, "embedding"), LinearInfo("lm_head", 64, 384)
TIED = dataclasses.replace(EMBEDDING, shared_with=("lm_head",))
IDS = torch.randint(4, 384, (6, 16), generator=torch.Generator().manual_seed(0))


def losses(model: Path, *infos: LinearInfo, fit: bool = False, whole: bool = False) -> dict[str, tuple[float, ...]]:
    tables = Tables(infos, {info.name: (FOUR, EIGHT) for info in infos}, fit)
    weights = StreamedModel(Checkpoint.open(model), whole)
    return sensitivity.score(weights, IDS, {}, settings=BackwardSettings(batch_size=2), tables=tables).losses


def kl_of(model: Path, **values: Tensor) -> float:
    """KL on the scored samples of a model whose embedding, ``rows``, or head has other values."""
    model_of: Any = Checkpoint.open(model).load_model().requires_grad_(False)
    ids = IDS[fitted(len(IDS)) :]
    right = torch.log_softmax(model_of(input_ids=ids).logits, -1)
    head = model_of.lm_head
    head.weight = torch.nn.Parameter(values.get("head", head.weight.clone()), requires_grad=False)
    if "rows" in values:
        model_of.model.embed_tokens.weight.data.copy_(values["rows"])
    found = torch.log_softmax(model_of(input_ids=ids).logits, -1)
    return float((right.exp() * (right - found)).sum(-1).mean())


def nearest(model: Path, name: str, spec: QuantSpec) -> Tensor:
    weight = Checkpoint.open(model).load_model().get_parameter(f"{name}.weight").detach()
    return torch.from_numpy(round_to_nearest.run(weight, spec).dequantize())


@pytest.mark.parametrize("whole", [False, True])
def test_a_score_is_the_kl_of_the_model_with_that_table_alone_rounded(models: Models, whole: bool) -> None:
    own, tied = models("llama"), models("qwen3")
    found = {**losses(own, EMBEDDING, HEAD, whole=whole), "tied": losses(tied, TIED, whole=whole)[TIED.name]}
    for place, spec in enumerate((FOUR, EIGHT)):
        rows, head = (nearest(own, name, spec) for name in (EMBEDDING.name, HEAD.name))
        both = nearest(tied, TIED.name, spec)
        expected = {
            EMBEDDING.name: kl_of(own, rows=rows), HEAD.name: kl_of(own, head=head),
            "tied": kl_of(tied, rows=both, head=both),
        }  # fmt: skip
        for name, kl in expected.items():  # a KL of 1e-6 is a difference of float32 logarithms of about 6
            assert found[name][place] == pytest.approx(kl, rel=0.01, abs=1e-6), (name, spec)
            assert found[name][0] > 10 * found[name][1] > 0


def test_few_bits_of_what_lm_head_reads_are_rounded_for_its_inputs(models: Models) -> None:
    model = models("qwen3")
    found = losses(model, TIED, fit=True)[TIED.name]
    aside = IDS[: fitted(len(IDS))]
    gram = head_gram(StreamedModel(Checkpoint.open(model)), aside, torch.ones(aside.shape), 2)
    weight = Checkpoint.open(model).load_model().get_parameter(f"{TIED.name}.weight").detach()
    rounded = GramSpace(gram, "lm_head").rounded(weight, FOUR)
    # Sums in another order turn few codes over.
    assert found[0] == pytest.approx(kl_of(model, rows=rounded, head=rounded), rel=0.02)
    by_itself = losses(models("llama"), HEAD, EMBEDDING, fit=True)
    to_nearest = losses(models("llama"), HEAD, EMBEDDING)
    assert by_itself[HEAD.name][0] != to_nearest[HEAD.name][0]
    assert by_itself[HEAD.name][1] == to_nearest[HEAD.name][1]
    assert by_itself[EMBEDDING.name] == to_nearest[EMBEDDING.name]


def planned(model: Path, monkeypatch: pytest.MonkeyPatch, head_loses: float, **asked: Any) -> BitAllocation:
    """A plan where a layer of the blocks loses .3 at 2 bits, .01 at 4 and nothing at 8, and an embedding .001 at 4."""

    def score(_: Any, __: Any, options: Any, ___: Any, ____: Any, _____: Any, tables: Tables | None) -> Scores:
        assert tables is not None and not set(tables.options) & set(options)
        found = {n: tuple({2: 0.3, 4: 0.01, 8: 0.0}[spec.bits] for spec in specs) for n, specs in options.items()}
        for info in tables.infos:
            lost = head_loses if HEAD.name in (info.name, *info.shared_with) else 0.001
            found[info.name] = tuple({4: lost, 8: 0.0}[spec.bits] for spec in tables.options[info.name])
        return Scores(found, ())

    monkeypatch.setattr(sensitivity, "score", score)
    settings = TuneSettings(embedding_bits="plan", group_size=32, **asked)
    weights = StreamedModel(Checkpoint.open(model))
    allocator = make_plan(weights.model, settings.schemes, values=()).bit_allocator
    assert allocator is not None
    return allocator.choose(weights, torch.zeros(2, 8), torch.device("cpu"))


def test_bits_of_tables_count_and_are_spent_where_they_buy_most(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {}
    for lost in (0.0001, 3.0):
        plan = planned(models("llama"), monkeypatch, lost, target_bits=5.5, choices=(4, 8))
        infos = make_plan(Checkpoint.open(models("llama")).load_model(), TuneSettings().schemes, values=()).layers
        weights = sum(info.in_features * info.out_features for info, _ in infos)
        assert plan.budget == int(5.5 * weights), "tables are in the mean"
        assert sum(row.cost for row in plan.rows) <= plan.budget
        chosen[lost] = {name: plan.specs()[name].bits for name in (EMBEDDING.name, HEAD.name)}
    assert chosen == {0.0001: {EMBEDDING.name: 4, HEAD.name: 4}, 3.0: {EMBEDDING.name: 4, HEAD.name: 8}}
    for lost in (0.0001, 3.0):
        tied = planned(models("qwen3"), monkeypatch, lost, target_kl=1.0, group_choices=(32,), kl_gain=1.0)
        assert [row.layers for row in tied.rows if row.layers[0] == TIED.name] == [(TIED.name,)]
        assert tied.specs()[TIED.name].bits == (4 if lost < 1 else 8)
        assert sum(row.score for row in tied.rows) <= 1.0


def test_a_product_of_lm_head_takes_time_and_looking_a_row_up_none(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: set[Product] = set()

    def times(products: Any, *_: Any) -> dict[Product, int]:
        found = {product: product.rows * product.spec.bits for product in products}
        timed.update(found)
        return found

    monkeypatch.setattr(allocate, "kernel_times", times)
    asked: dict[str, Any] = {"cost": "latency", "target_speedup": 0.9}
    plan = planned(models("llama"), monkeypatch, 0.5, **asked)
    costs = {row.layers: row.cost for row in plan.rows}
    assert costs[HEAD.name,] == 384 * plan.specs()[HEAD.name].bits
    assert costs[EMBEDDING.name,] == 0 and plan.specs()[EMBEDDING.name].bits == 8, "bits that cost no time"
    assert {product.spec.bits for product in timed if product.rows == 384} == {4, 8}
    tied = {row.layers: row.cost for row in planned(models("qwen3"), monkeypatch, 0.5, **asked).rows}
    assert tied[TIED.name,] > 0


def test_tune_rounds_the_table_as_its_plan_says(models: Models, calibration_text: Path, tmp_path: Path) -> None:
    settings = TuneSettings(
        recipe="rtn", group_size=32, num_samples=3, sample_len=16, embedding_bits="plan", target_bits=4.75,
        choices=(4, 8), calibration=str(calibration_text),
    )  # fmt: skip
    artifact = Artifact.open(tune(models("qwen3"), tmp_path / "out", settings, progress=False))
    rows = {row["layers"][0]: row for row in artifact.manifest.algorithm["settings"]["mix"]["rows"]}
    assert set(rows) == set(artifact.names()) and artifact.bits_per_weight <= 4.75
    assert artifact.entry(TIED.name).spec.to_json() == rows[TIED.name]["spec"]
    assert artifact.entry(TIED.name).info.shared_with == ("lm_head",)
    assert rows[TIED.name]["spec"]["bits"] == 4, "8 do not fit"


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(UsageError, match="embedding_bits plan does nothing without target_bits"):
        TuneSettings(embedding_bits="plan")
    with pytest.raises(UsageError, match=r"tables are measured in nats.*delta_loss"):
        TuneSettings(embedding_bits="plan", target_bits=4, scoring="delta_loss")
    kept = TuneSettings(embedding_bits="plan", target_kl=0.1)
    assert kept.without_budget().embedding_bits == "auto" and kept.schemes.embedding_bits == 8
    assert kept.to_json()["embedding_bits"] == "plan"
