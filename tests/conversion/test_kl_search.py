"""`convert` with a target KL: rounds until a package keeps it, what is left of them, and how a search goes on."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from roundexport import Checkpoint, TuneSettings, convert
from roundexport.conversion import kl_search
from roundexport.conversion.asked_targets import Asked
from roundexport.conversion.claimed_folder import claimed
from roundexport.conversion.convert import _make_artifact
from roundexport.conversion.kl_search import KlSearch
from roundexport.conversion.settings import ConvertSettings
from roundexport.errors import Interrupted, UnsupportedError, UsageError
from roundexport.formats.artifact import Artifact
from roundexport.progress import Progress
from roundexport.schemes.settings import Cost
from roundexport.tuning.planned_run import PlannedRun
from roundexport.verification.report import DecoderQuality, Figure

Models = Callable[[str], Path]
QUIET = Progress(enabled=False)


def quality(kl: float) -> DecoderQuality:
    """What verification of a decoder gives, as far as the search reads it."""
    made = object.__new__(DecoderQuality)
    object.__setattr__(made, "kl", Figure(kl, 0.0))
    return made


def search(
    model: Path, folder: Path, target_kl: float, monkeypatch: pytest.MonkeyPatch, cost: Cost = "bits", **losses: float
) -> KlSearch:
    """A search whose rounds lose what is said here and take no time; one of which nothing is said is stopped."""

    def tune(_: Any, out: Path, settings: TuneSettings, **__: Any) -> Path:
        if out.parent.name not in losses:
            raise Interrupted("stopped")
        out.mkdir(parents=True)
        (out / "gain").write_text(f"{settings.recipe} {settings.kl_gain} {settings.cost}")
        return out

    def verify(package: Path, **_: Any) -> Any:
        return SimpleNamespace(quality=quality(losses[package.parent.name]))

    monkeypatch.setattr(kl_search, "tune", tune)
    monkeypatch.setattr(kl_search, "export", lambda _, package, **__: package.mkdir())
    monkeypatch.setattr(kl_search, "verify", verify)
    monkeypatch.setattr(kl_search, "_predicted", lambda artifact: 0.1)
    settings = TuneSettings(recipe="light", target_kl=target_kl, cost=cost)
    folder.mkdir(exist_ok=True)
    return KlSearch(Checkpoint.open(model), folder, settings, "onnx", None, QUIET)


def test_a_search_goes_on_where_it_was_stopped(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models("llama")
    with pytest.raises(Interrupted):
        search(model, tmp_path / "out", 0.1, monkeypatch, floor=0.01, **{"1": 0.3}).run()
    kept = json.loads((tmp_path / "out" / "rounds" / "rounds.json").read_text())
    assert kept["floor"] == 0.01 and [tried["kl"] for tried in kept["rounds"]] == [0.3]
    search(model, tmp_path / "out", 0.1, monkeypatch, **{"2": 0.095}).run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["artifact"]
    recipe, gain, _ = (tmp_path / "out" / "artifact" / "gain").read_text().split()
    assert recipe == "light" and float(gain) == pytest.approx(0.1 / (0.1 * 0.085 / 0.29))


def test_rounds_of_another_text_are_measured_on_this_one(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out, text = models("llama"), tmp_path / "out", tmp_path / "text.txt"
    text.write_text("another")
    with pytest.raises(Interrupted):
        search(model, out, 0.1, monkeypatch, floor=0.01, **{"1": 0.3}).run()
    (out / "rounds" / "2" / "artifact").mkdir(parents=True)  # of a plan by what the other text said
    again = search(model, out, 0.1, monkeypatch, floor=0.02, **{"1": 0.2, "2": 0.095})
    dataclasses.replace(again, text=text).run()
    _, gain, _ = (out / "artifact" / "gain").read_text().split()
    assert float(gain) == pytest.approx(0.1 / (0.1 * 0.075 / 0.18))


def test_rounds_that_missed_a_target_are_of_use_to_another_one(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out, missed = models("llama"), tmp_path / "out", {"1": 0.3, "2": 0.29}
    for _ in range(2):
        with pytest.raises(UsageError, match=r"not reached in 2 rounds.* ask for more in the same folder"):
            search(model, out, 0.1, monkeypatch, floor=0.01, **missed).run()
    with pytest.raises(UsageError, match=r"loses 0\.01000 already"):
        search(model, out, 0.005, monkeypatch).run()
    asked = TuneSettings(target_kl=0.25)
    assert kl_search.rounds_at_most(out, asked) == 6 and kl_search.rounds_at_most(tmp_path, asked) == 4
    with pytest.raises(Interrupted):
        search(model, out, 0.25, monkeypatch).run()
    assert kl_search.rounds_at_most(out, asked) == 6
    shutil.copytree(out, tmp_path / "larger")
    search(model, out, 0.25, monkeypatch, **{"3": 0.24}).run()
    search(model, tmp_path / "larger", 0.3, monkeypatch).run()  # one of them keeps it already
    for folder, target in ((out, 0.25), (tmp_path / "larger", 0.3)):
        assert [path.name for path in folder.iterdir()] == ["artifact"], target


def test_a_folder_takes_another_target_while_a_plan_is_searched_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "rounds").mkdir(parents=True)
    (out / "request.json").write_text('{"bits": 4, "target_kl": 0.05}')
    with claimed(out, {"bits": 4, "target_kl": 0.1}, None, {}, kl_search.may_change):
        assert json.loads((out / "request.json").read_text())["target_kl"] == 0.1
    other = {"bits": 8, "target_kl": 0.1}
    with pytest.raises(UsageError, match="begun with bits 4;"), claimed(out, other, None, {}, kl_search.may_change):
        pass
    (out / "artifact").mkdir()
    other = {"bits": 4, "target_kl": 0.2}
    with pytest.raises(UsageError, match=r"target_kl 0\.1"), claimed(out, other, None, {}, kl_search.may_change):
        pass


def test_the_floor_of_a_search_for_speed_is_not_timed(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {"floor": 0.01, "1": 0.095}
    search(models("llama"), tmp_path / "out", 0.1, monkeypatch, "latency", **losses).run()
    assert (tmp_path / "out" / "artifact" / "gain").read_text().split()[2] == "latency"


def test_a_table_of_few_bits_is_rounded_in_the_floor_as_in_the_rounds() -> None:
    recipes = {
        bits: kl_search.floor_of(TuneSettings(target_kl=0.1, embedding_bits=bits)).recipe for bits in (8, 4, None)
    }
    assert recipes == {8: "rtn", 4: "light", None: "rtn"}


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"embedding_bits": 4, "group_choices": (16, None)},
        {"embedding_group_size": 16, "everything": True},
        {"embedding_bits": None},
    ],
)
def test_tables_have_one_scheme_in_the_floor_and_in_the_rounds(models: Models, asked: dict[str, Any]) -> None:
    checkpoint, settings = Checkpoint.open(models("llama")), TuneSettings(target_kl=0.1, choices=(4, 8), **asked)
    floor, rounds = (PlannedRun(checkpoint, one).plan for one in (kl_search.floor_of(settings), settings))
    tables = [
        {info.name: spec for info, spec in plan.layers if not plan.stack.holds(info.name)} for plan in (floor, rounds)
    ]
    assert tables[0] == tables[1] and bool(tables[0]) == (settings.embedding_bits is not None)
    finest = (8, min(settings.group_choices or (32,), key=lambda group: group or 1 << 30))
    assert {(spec.bits, spec.group_size) for block in floor.block_specs for spec in block.values()} == {finest}


def test_the_package_that_is_measured_has_the_graph_of_the_one_that_ships(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    one = search(models("llama"), tmp_path / "out", 0.1, monkeypatch, floor=0.01, **{"1": 0.095})
    monkeypatch.setattr(kl_search, "export", lambda _, package, **more: (package.mkdir(), given.append(more)))
    dataclasses.replace(one, graph={"kernels": True, "no such": True}).run()
    assert [more["settings"] for more in given] == [{"kernels": True}] * 2
    asked: list[KlSearch] = []

    def run(self: KlSearch) -> None:
        asked.append(self)

    monkeypatch.setattr(KlSearch, "run", run)
    wanted = ConvertSettings(Asked.of("onnx"), kernels=True)
    _make_artifact(one.checkpoint, tmp_path, one.settings, wanted, ["onnx"], {"kernels": True}, QUIET)
    assert asked[0].graph == {"kernels": True}


def test_a_target_below_the_floor_is_refused_and_leaves_nothing(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"loses 0\.01000 already"):
        search(models("llama"), tmp_path / "out", 0.005, monkeypatch, floor=0.01).run()
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(UnsupportedError, match="target_kl is for decoders"):
        search(models("bert"), tmp_path / "bert", 0.1, monkeypatch)


def test_convert_leaves_the_plan_and_nothing_of_the_search(models: Models, heldout_text: Path, tmp_path: Path) -> None:
    settings = TuneSettings(recipe="rtn", target_kl=9.0, choices=(4, 8), num_samples=2, sample_len=32)
    done = convert(models("llama, one block"), tmp_path / "out", settings, to="onnx", text=heldout_text, progress=False)
    made = Artifact.open(done.artifact).manifest
    plan = made.algorithm["settings"]["mix"]
    assert plan["target_kl"] == 9.0 and plan["kl_gain"] > 0 and {row["spec"]["bits"] for row in plan["rows"]} == {4}
    made_of = ["artifact", "onnx", "quality.json", "request.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == made_of


def test_what_another_run_holds_or_an_upgrade_forbids_removes_no_rounds(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UsageError("artifact is being written by another run")

    one = search(models("llama"), tmp_path / "out", 0.1, monkeypatch)
    state = tmp_path / "out" / "rounds" / "floor" / "artifact.partial" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text("{}")
    monkeypatch.setattr(kl_search, "tune", refuse)
    with pytest.raises(UsageError, match="by another run"):
        one.run()
    assert state.exists()
