"""Bits chosen per layer: the budget is kept, by bits and by measured time, and a run that goes on keeps its plan."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from roundexport import TuneSettings, tune
from roundexport.calibration.kept_samples import samples_kept
from roundexport.errors import Interrupted, UsageError
from roundexport.formats.artifact import Artifact
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.schemes import allocate, sensitivity
from roundexport.schemes.allocate import BitAllocation, BitAllocator
from roundexport.schemes.kernel_timing import Product
from roundexport.schemes.rules import LinearScheme, Rule, decide
from roundexport.schemes.sensitivity import Scores
from roundexport.tuning.setting_field import auto_or_group_sizes

Models = Callable[[str], Path]
LAYERS = [LinearInfo("q", 64, 64), LinearInfo("k", 64, 32), LinearInfo("o", 64, 64), LinearInfo("up", 64, 128)]
QUICK = TuneSettings(recipe="rtn", group_size=32, num_samples=3, sample_len=16)


def allocator(settings: TuneSettings, *rules: Rule) -> BitAllocator:
    search = settings.schemes.search
    schemes = search.schemes(LinearScheme(settings.bits, settings.group_size))
    return BitAllocator.of([decide(LAYERS, scheme, rules) for scheme in schemes], search)


def mixed(
    found: BitAllocator, monkeypatch: pytest.MonkeyPatch, sharing: tuple[tuple[str, ...], ...] = ()
) -> BitAllocation:
    """The plan when a layer loses its number of rows at 2 bits, a tenth of it at 4, nothing at 8; o ten times that."""
    losses = {
        name: tuple((10.0 if name == "o" else 1.0) * found.infos[name].out_features * {2: 1, 4: 0.1, 8: 0}[spec.bits]
                    for spec in specs)
        for name, specs in found.options.items()
    }  # fmt: skip
    monkeypatch.setattr(sensitivity, "score", lambda *_: Scores(losses, sharing))
    return found.choose(None, torch.zeros(2, 8), torch.device("cpu"))  # type: ignore[arg-type]


def test_the_mean_of_the_stored_bits_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TuneSettings(target_bits=3.5, group_size=32)
    allocation = mixed(allocator(settings), monkeypatch)
    weights = sum(info.in_features * info.out_features for info in LAYERS)
    stored = sum(allocation.specs()[i.name].storage_bits(i.out_features, i.in_features) for i in LAYERS)
    assert stored == sum(row.cost for row in allocation.rows) <= allocation.budget == int(3.5 * weights)
    assert allocation.specs()["o"].bits > 2 and allocation.specs()["up"].bits == 2
    assert BitAllocation.from_json(json.loads(json.dumps(allocation.to_json()))) == allocation
    first = allocation.rows[0]
    shown = {"layer": "q", "scheme": first.spec.describe(), "score": first.score, "bits": first.cost}
    assert allocation.table()[0] == shown and first.score in (64.0, pytest.approx(6.4), 0.0)


def test_a_budget_is_spent_to_the_last_layer_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"q": (192, 64), "k": (64, 64), "up": (512, 192), "down": (192, 512)}
    infos = {f"{i}.{name}": LinearInfo(f"{i}.{name}", k, n) for i in range(8) for name, (n, k) in shapes.items()}
    search = TuneSettings(target_bits=3.0, choices=(2, 3, 4, 8)).schemes.search
    schemes = search.schemes(LinearScheme(3, 64, symmetric=False))
    found = BitAllocator.of([decide(list(infos.values()), scheme) for scheme in schemes], search)
    losses = {
        name: tuple(
            (1 + place) * info.in_features * info.out_features * 4.0**-spec.bits for spec in found.options[name]
        )
        for place, (name, info) in enumerate(infos.items())
    }
    monkeypatch.setattr(sensitivity, "score", lambda *_: Scores(losses, ()))
    plan = found.choose(None, torch.zeros(2, 8), torch.device("cpu"))  # type: ignore[arg-type]
    weights = sum(info.in_features * info.out_features for info in infos.values())
    # Counted by hand: codes, float16 scales and zero points as wide as a code, one of each per 64 weights.
    spent = sum((spec.bits + (16 + spec.bits) / 64) * infos[name].in_features * infos[name].out_features
                for name, spec in plan.specs().items())  # fmt: skip
    assert 2.98 * weights < spent <= 3.0 * weights
    wider = [(8 if spec.bits == 4 else spec.bits + 1, spec, infos[name]) for name, spec in plan.specs().items() if
             spec.bits < 8]  # fmt: skip
    prices = [(bits - spec.bits) * (1 + 1 / 64) * info.in_features * info.out_features for bits, spec, info in wider]
    assert spent + min(prices) > 3.0 * weights


def test_a_rule_settles_a_layer_and_its_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TuneSettings(target_bits=4.0, group_size=32)
    rules = (Rule("up", {"bits": 2}), Rule("k", keep_float=True), Rule("q", {"group_size": 16}))
    allocation = mixed(allocator(settings, *rules), monkeypatch)
    assert allocation.specs()["up"] == QuantSpec(2, 32, False) and "k" not in allocation.specs()
    assert allocation.specs()["q"].group_size == 16


def test_an_impossible_target_is_refused_before_any_work() -> None:
    with pytest.raises(UsageError, match=r"2\.000 bits per weight cannot be met.* 2\.562 bits per weight to 8\.500"):
        allocator(TuneSettings(target_bits=2.0, group_size=32))


def test_a_kl_is_kept_with_the_fewest_bits_and_small_groups_are_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {}
    for gain in (1.0, 0.25):
        settings = TuneSettings(target_kl=40.0, kl_gain=gain, group_choices=(32, 64))
        kept[gain] = mixed(allocator(settings), monkeypatch)
        assert 0.5 * 40 < gain * sum(row.score for row in kept[gain].rows) <= 40
    assert kept[0.25].budget < kept[1.0].budget == sum(row.cost for row in kept[1.0].rows)
    found = allocator(TuneSettings(target_kl=0.05)).options
    assert {(spec.bits, spec.group_size) for spec in found["up"]} == {(b, g) for b in (2, 4, 8) for g in (32, 64)}
    told: list[str] = []
    monkeypatch.setattr(sensitivity, "score", lambda *_: Scores({n: (1.0,) * len(o) for n, o in found.items()}, ()))
    allocator(TuneSettings(target_kl=0.05, kl_gain=0.5)).choose(
        None, torch.zeros(2, 8), torch.device("cpu"), told.append
    )  # type: ignore[arg-type]
    assert told[-1].endswith("is expected to lose 2.00000 nats per token, and no plan with these choices 0.05")


def test_whole_rows_are_a_choice_of_groups() -> None:
    for text, sizes in (("32,none", {32, None}), ("none", {None}), ("auto", {32})):
        groups = auto_or_group_sizes(text, "--group-choices")
        found = allocator(TuneSettings(target_bits=4.0, choices=(2, 3), group_choices=groups, group_size=32)).options
        assert {(spec.bits, spec.group_size) for spec in found["up"]} == {(b, g) for b in (2, 3) for g in sizes}, text


def times(products: Any, bench: Any, tell: Any) -> dict[Product, int]:
    """Time goes with bits and rows; 500 ns to begin with."""
    return {p: 500 + p.rows * p.spec.bits + (50 if p.spec.group_size == 32 else 0) for p in products}


@pytest.mark.parametrize(("target", "merges"), [("onnx", True), ("openvino", True), ("onnx", False)])
def test_time_is_the_budget_and_merged_products_are_one(
    target: str, merges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert allocate.merged(target)
    rows = [("q", "k"), ("o",), ("up",)] if merges else None
    monkeypatch.setattr(allocate, "merged", lambda target: merges)
    monkeypatch.setattr(allocate, "kernel_times", times)
    settings = TuneSettings(cost="latency", target_speedup=1.1, cost_target=target, group_size=64)
    found = allocator(settings)
    allocation = mixed(found, monkeypatch, (("q", "k"),))
    assert allocation.unit == "ns" and sum(row.cost for row in allocation.rows) <= allocation.budget
    assert allocation.specs()["q"] == allocation.specs()["k"], "tied"
    base = sum(550 + 4 * n for n in ((96, 64, 128) if rows else (64, 32, 64, 128)))
    assert allocation.budget == int(base / 1.1)
    if rows:
        assert [row.layers for row in allocation.rows] == rows
        assert allocation.rows[0].cost == 500 + 96 * allocation.rows[0].spec.bits
    fast = dataclasses.replace(settings, target_speedup=5.0)
    with pytest.raises(UsageError, match=r"5\.00 times the speed of int4 g32 sym cannot be met.*1\.\d\d times"):
        mixed(allocator(fast), monkeypatch)


def test_a_kl_is_kept_at_most_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_two_bits(products: Any, bench: Any, tell: Any) -> dict[Product, int]:
        return {p: p.rows * {2: 6, 4: 4, 8: 7}[p.spec.bits] for p in products}  # as where 2 bits take a slower kernel

    monkeypatch.setattr(allocate, "merged", lambda target: True)
    monkeypatch.setattr(allocate, "kernel_times", slow_two_bits)
    asked = TuneSettings(target_kl=200.0, kl_gain=1.0, group_choices=(32, 64))
    small = mixed(allocator(asked), monkeypatch, (("q", "k"),))
    fast = mixed(allocator(dataclasses.replace(asked, cost="latency")), monkeypatch, (("q", "k"),))
    assert fast.unit == "ns" and small.unit == "bits"
    assert 2 in {spec.bits for spec in small.specs().values()}
    assert {spec.bits for spec in fast.specs().values()} == {4}, "what is small here is slow"
    assert sum(row.score for row in fast.rows) <= 200
    assert fast.budget == sum(row.cost for row in fast.rows)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UsageError, match=r"needs target_speedup, as in 1\.2, or target_kl"):
        TuneSettings(cost="latency")
    with pytest.raises(UsageError, match="target_speedup needs cost latency"):
        TuneSettings(target_speedup=1.2)
    with pytest.raises(UsageError, match="exclude each other"):
        TuneSettings(cost="latency", target_speedup=1.2, target_bits=3)
    with pytest.raises(UsageError, match="there is one budget"):
        TuneSettings(target_kl=0.05, target_bits=3)
    with pytest.raises(UsageError, match="there is one budget"):
        TuneSettings(target_kl=0.05, cost="latency", target_speedup=1.2)
    with pytest.raises(UsageError, match="needs scores in nats"):
        TuneSettings(target_kl=0.05, scoring="delta_loss")


def test_layers_that_share_an_input_can_be_tied(monkeypatch: pytest.MonkeyPatch) -> None:
    sharing = (("q", "k", "up"),)
    apart = mixed(allocator(TuneSettings(target_bits=4.0, group_size=32)), monkeypatch, sharing)
    tied = mixed(allocator(TuneSettings(target_bits=4.0, group_size=32, tie=True)), monkeypatch, sharing)
    assert len({apart.specs()[name].bits for name in sharing[0]}) > 1
    assert len({tied.specs()[name].bits for name in sharing[0]}) == 1
    assert sum(row.cost for row in tied.rows) <= tied.budget
    assert sum(row.score for row in apart.rows) <= sum(row.score for row in tied.rows)


def test_runs_that_keep_samples_score_layers_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def score(weights: Any, ids: torch.Tensor, options: Any, *_: Any) -> Scores:
        taken.append(len(ids))
        return Scores(
            {name: tuple(10.0**-spec.bits for spec in specs) for name, specs in options.items()}, (("q", "k"),)
        )

    monkeypatch.setattr(sensitivity, "score", score)
    model: Any = SimpleNamespace(checkpoint=SimpleNamespace(digest="0" * 64), bfloat16=False)
    ids, cpu = torch.arange(8).view(2, 4), torch.device("cpu")
    plans = []
    with samples_kept(tmp_path):
        for target in (3.5, 3.5, 4.5):
            found = allocator(TuneSettings(target_bits=target, group_size=32, tie=True))
            plans.append(found.choose(model, ids, cpu))
        assert taken == [2]
        allocator(TuneSettings(target_bits=4.5, group_size=64)).choose(model, ids, cpu)
        allocator(TuneSettings(target_bits=4.5, group_size=64)).choose(model, ids + 1, cpu)
        for place, name, value in (
            (sensitivity, "_SCORED", 7),
            (allocate, "library_versions", lambda: {"roundexport": "another"}),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(place, name, value)
                allocator(TuneSettings(target_bits=3.5, group_size=32, tie=True)).choose(model, ids, cpu)
    assert taken == [2] * 5, "scores of other constants or versions are not these"
    assert plans[0] == plans[1] != plans[2]
    assert plans[0] == allocator(TuneSettings(target_bits=3.5, group_size=32, tie=True)).choose(model, ids, cpu)
    assert taken == [2] * 6


def test_scores_are_those_that_were_asked_for(models: Models, calibration_text: Path, tmp_path: Path) -> None:
    scores = {}
    for scoring in ("fisher", "delta_loss"):
        settings = dataclasses.replace(QUICK, target_bits=4.2, scoring=scoring, calibration=str(calibration_text))
        artifact = Artifact.open(tune(models("llama"), tmp_path / scoring, settings, progress=False))
        allocation = artifact.manifest.algorithm["settings"]["mix"]
        assert allocation["scoring"] == scoring and artifact.bits_per_weight < 8.5
        scores[scoring] = [row["score"] for row in allocation["rows"]]
    assert scores["fisher"] != scores["delta_loss"]
    with pytest.raises(UsageError, match="scoring must be fisher or delta_loss, not 'hessian'"):
        TuneSettings(scoring="hessian")  # type: ignore[arg-type]


def test_tune_keeps_the_target_and_records_the_plan(models: Models, calibration_text: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text('[{"match": "0.mlp.up_proj", "keep_float": true, "reason": "by hand"}]')
    settings = dataclasses.replace(
        QUICK, target_bits=4.2, calibration=str(calibration_text), rules=str(rules), embedding_bits=None
    )
    artifact = Artifact.open(tune(models("qwen3"), tmp_path / "out", settings, progress=False))
    assert artifact.bits_per_weight <= 4.2
    assert len({entry.spec.bits for entry in artifact.manifest.layers}) > 1
    assert dict(artifact.manifest.kept_float)["model.layers.0.mlp.up_proj"] == "by hand"
    recorded = artifact.manifest.algorithm["settings"]
    assert recorded["mix"]["target_bits"] == 4.2 and len(recorded["mix"]["rows"]) == len(artifact.manifest.layers)
    assert recorded["rules"][0]["match"] == "0.mlp.up_proj"


def test_a_run_that_goes_on_keeps_its_plan(
    models: Models, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from roundexport.algorithms.rounding import rtn

    settings = dataclasses.replace(QUICK, target_bits=4.2, calibration=str(calibration_text))
    whole = tune(models("llama"), tmp_path / "whole", settings, progress=False)
    original, done = rtn.tune_block, []

    def stop(*args: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return original(*args)

    with monkeypatch.context() as patched:
        patched.setattr(rtn, "METHOD", dataclasses.replace(rtn.METHOD, tune_block=stop))
        with pytest.raises(Interrupted):
            tune(models("llama"), tmp_path / "out", settings, progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(sensitivity, "score", lambda *_: pytest.fail("scored again"))
        out = tune(models("llama"), tmp_path / "out", settings, progress=False)
    for path in whole.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    with pytest.raises(UsageError):
        monkeypatch.setattr(rtn, "METHOD", dataclasses.replace(rtn.METHOD, tune_block=stop))
        with pytest.raises(Interrupted):
            tune(models("llama"), tmp_path / "again", settings, progress=False)
        tune(models("llama"), tmp_path / "again", dataclasses.replace(settings, target_bits=4.3), progress=False)
