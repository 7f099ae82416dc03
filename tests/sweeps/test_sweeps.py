"""A sweep: which runs there are, that finished ones stay, what failed is told, samples are shared, what is unbeaten."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cluster_toys import InlinePool
from filelock import FileLock

from roundexport import TuneSettings
from roundexport.calibration.kept_samples import samples_kept, samples_once
from roundexport.calibration.samples import Calibration
from roundexport.cluster.opening import Cluster
from roundexport.cluster.workers import Workers
from roundexport.errors import Interrupted, RoundexportError, UsageError, WontFitError
from roundexport.runtime import Contestant
from roundexport.sweeps import entry, running
from roundexport.sweeps.entry import sweep
from roundexport.sweeps.frontier import frontiers
from roundexport.sweeps.grid import Axes, runs_of
from roundexport.sweeps.running import Row

Models = Callable[[str], Path]
AXES = Axes(("rtn", "default"), (4, 2), (32,))


def test_runs_are_named_by_their_content(models: Models, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one")
    base = TuneSettings(calibration=str(text))
    runs = runs_of([models("llama"), models("llama")], AXES, base, ["onnx"], tmp_path)
    assert len(runs) == len({run.name for run in runs}) == 4, "the same model twice is one"
    assert runs[0].name.startswith("llama-rtn-4-g32-") and runs[0].about()["bits"] == 4
    again = runs_of([models("llama")], AXES, base, ["onnx"], tmp_path)
    assert [run.name for run in again] == [run.name for run in runs]
    text.write_text("two")
    assert not {run.name for run in runs_of([models("llama")], AXES, base, ["onnx"], tmp_path)} & {r.name for r in runs}


def test_another_held_out_text_is_another_run(models: Models, tmp_path: Path) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "pictures"
    folder.mkdir()

    def names(held_out: Path | None) -> set[str]:
        return {run.name for run in runs_of([models("llama")], AXES, TuneSettings(), ["onnx"], tmp_path, held_out)}

    found = [names(None)]
    for content in ("one", "two"):
        text.write_text(content)
        (folder / "a.png").write_text(content)
        found += [names(text), names(folder)]
    assert len(set.union(*found)) == 5 * len(found[0]), "a run answers with the losses of another text"
    with pytest.raises(UsageError, match=r"held-out text .* does not exist"):
        names(tmp_path / "none")


def test_more_memory_is_the_same_request(models: Models, tmp_path: Path) -> None:
    first, second = (
        runs_of([models("llama")], AXES, TuneSettings(max_ram=gib), ["onnx"], tmp_path) for gib in (8, None)
    )
    assert [run.name for run in first] == [run.name for run in second] and first[0].settings.max_ram == 8


def test_workers_find_what_was_named_from_here(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").symlink_to(models("llama"))
    (tmp_path / "rules.json").write_text("[]")
    for name in ("own.txt", "held.txt"):
        (tmp_path / name).write_text("text")
    monkeypatch.chdir(tmp_path)
    base = TuneSettings(calibration="own.txt", rules="rules.json")
    run = runs_of(["model"], AXES, base, ["onnx"], tmp_path / "out", "held.txt")[0]
    found = [run.model, run.text, run.settings.calibration, run.settings.rules]
    assert found == [str(tmp_path / name) for name in ("model", "held.txt", "own.txt", "rules.json")]


@pytest.mark.parametrize(
    ("axes", "message"),
    [({"recipes": ()}, "recipes must name"), ({"recipes": ("good",)}, "unknown recipe 'good'"), ({"bits": ()}, "bits")],
)
def test_axes_that_make_no_sense(axes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Axes(**axes)


def test_steps_are_given_to_methods_that_take_them() -> None:
    axes = Axes(("rtn", "light", "default"), (4,), (32,))
    asked = axes.settings(TuneSettings(steps=7))
    assert [(one.recipe, one.steps) for one in asked] == [("rtn", None), ("light", 7), ("default", 7)]
    finished = axes.settings(TuneSettings(steps=7, finish="end_to_end"))
    assert [one.steps for one in finished] == [7, 7, 7], "a finish takes them after any rounding"
    with pytest.raises(UsageError, match=r"steps 7 do nothing: no method of recipes rtn has any"):
        Axes(("rtn",)).settings(TuneSettings(steps=7))


def test_the_same_tuning_by_two_recipes_is_one_run() -> None:
    recipes = ("rtn", "light", "default", "best")
    own = Axes(recipes, group_sizes=(32, 32)).settings(TuneSettings(algorithm="optimal_rtn", num_samples=16))
    assert [(one.recipe, one.group_size) for one in own] == [("rtn", 32)]
    sampled = Axes(recipes).settings(TuneSettings(algorithm="signround"))
    assert [one.recipe for one in sampled] == ["rtn", "light"], "light has fewer samples"
    assert len(Axes(recipes).settings(TuneSettings())) == len(recipes)


def test_two_models_of_one_name_are_refused(models: Models, tmp_path: Path) -> None:
    other = tmp_path / models("llama").name
    shutil.copytree(models("qwen3"), other)
    with pytest.raises(UsageError, match="two different models are called"):
        runs_of([models("llama"), other], AXES, TuneSettings(), ["onnx"], tmp_path)


@pytest.fixture
def converting(packages: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Conversions that take no time: a package of ours is copied; names of those that were made."""
    package, made = packages("llama", "onnx")[1], list[str]()

    def convert(model: str, out: Path, settings: TuneSettings, *, to: Any, text: Any, progress: Any) -> None:
        if settings.recipe == "default" and settings.bits == 2:
            raise RoundexportError("this one cannot be made")
        if settings.recipe == "light":
            raise TypeError("a library's")
        shutil.copytree(package, out / "onnx")
        kl = {"mean": 0.1 / settings.bits, "stderr": 0.0}
        quality = {"onnx": {"quality": {"kl": kl, "top1": {"mean": 0.9, "stderr": 0.0}}, "failures": []}}
        found = {"packages": {"onnx": "onnx"}, "quality": quality, "bits_per_weight": float(settings.bits)}
        (out / "quality.json").write_text(json.dumps(found))
        made.append(out.name)

    monkeypatch.setattr(running, "convert", convert)
    return made


def test_a_sweep_goes_on_and_ends_in_a_frontier(
    models: Models, tmp_path: Path, converting: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, wanted = tmp_path / "out", {"axes": AXES, "speed": False, "progress": False}
    with monkeypatch.context() as patch:
        original = entry.attempt
        calls = iter(range(9))

        def press(*args: Any) -> str:
            if next(calls) == 1:
                raise KeyboardInterrupt
            return original(*args)

        patch.setattr(entry, "attempt", press)
        with pytest.raises(Interrupted, match="stopped after 1 of 4 runs; run the same command again"):
            sweep(models("llama"), out, **wanted)
    made = sweep(models("llama"), out, **wanted)
    assert len(converting) == 3, "a finished run was done again"
    assert [row["loss"] for row in made.rows] == [0.025, 0.025, 0.05, None]
    assert "this one cannot be made" in made.rows[-1]["error"] and list(made.failed) == [
        run.name for run in runs_of([models("llama")], AXES, TuneSettings(), ["onnx"], out)
        if (run.settings.recipe, run.settings.bits) == ("default", 2)
    ]  # fmt: skip
    assert json.loads((out / "frontier.json").read_text()) == made.rows
    report = made.reports[0].read_text(encoding="utf-8")
    assert made.reports == [out / "llama.html"] and "Size, loss and speed" in report
    (out / "sweep.json").unlink()
    with pytest.raises(UsageError, match="is not a sweep's"):
        sweep(models("llama"), out, **wanted)


def test_whole_runs_are_shared_by_workers(
    models: Models, tmp_path: Path, converting: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, asked = InlinePool(2, lambda number: number == 1), []

    @contextmanager
    def opened(text: str | None, **_: Any) -> Iterator[Cluster | None]:
        asked.append(text)
        yield None if text is None else Cluster(Workers(pool))

    monkeypatch.setattr(entry, "open_cluster", opened)
    wanted = {"axes": AXES, "speed": False, "progress": False}
    plain = sweep(models("llama"), tmp_path / "plain", **wanted)
    found = sweep(models("llama"), tmp_path / "out", cluster="local:2", **wanted)
    assert [{**row, "package": None} for row in found.rows] == [{**row, "package": None} for row in plain.rows]
    assert all(pool.by_place) and pool.restarts == 1, "somebody had nothing to do, or nobody died"
    assert list(found.failed) == list(plain.failed) != []
    assert asked == [None, "local:2"]


def test_a_run_that_kills_its_workers_or_is_a_fault_is_a_row(
    models: Models, tmp_path: Path, converting: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def opened(text: str | None, **_: Any) -> Iterator[Cluster | None]:
        yield Cluster(Workers(InlinePool(1, lambda number: number < 3)))

    monkeypatch.setattr(entry, "open_cluster", opened)
    axes = Axes(("rtn", "light"), (4, 2), (32,))
    found = sweep(models("llama"), tmp_path / "out", axes=axes, speed=False, cluster="local:1", progress=False)
    errors = [row["error"] for row in found.rows]
    assert len(converting) == 1 and errors[0] == "" and sorted(errors[1:])[1:] == ["TypeError: a library's"] * 2
    assert sorted(errors[1:])[0].startswith("3 workers died one after the other")


class Opening:
    """A package's process, which opens what has no 2 bits."""

    def __init__(self, contestant: Contestant, threads: int) -> None:
        if "-2-" in contestant.files[0].parent.name:
            raise RoundexportError("its runtime refuses it")

    def close(self) -> None:
        """Nothing was started."""


def test_a_timing_that_fails_loses_nothing_else(
    models: Models, tmp_path: Path, converting: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    frontier, told = tmp_path / "out" / "frontier.json", list[str]()

    def bench(*_: Any, **__: Any) -> None:
        assert len(json.loads(frontier.read_text())) == 2, "written before anything is timed"
        raise TypeError("a library's")

    monkeypatch.setattr("roundexport.runtime.benchmarking.process.ContestantProcess", Opening)
    monkeypatch.setattr("roundexport.runtime.bench", bench)
    monkeypatch.setattr("roundexport.progress.Progress.say", lambda _, text: told.append(text))
    found = sweep(models("llama"), tmp_path / "out", axes=Axes(("rtn",), (4, 2), (32,)), progress=False)
    assert [row["per second"] for row in found.rows] == [None, None] and found.reports[0].is_file()
    notes = [text for text in told if text.startswith("note: ") and "timed" in text]
    assert "its runtime refuses it" in notes[0] and "nothing of 1 is timed: TypeError: a library's" in notes[1]


def test_a_package_that_does_not_open_is_a_row_without_speed(
    models: Models, tmp_path: Path, converting: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []

    def bench(names: list[str], **_: Any) -> Any:
        timed.extend(names)
        rows = [{"contestant": name, "decode_tps": 5.0} for name in names]
        return SimpleNamespace(to_json=lambda: {"rows": rows})

    monkeypatch.setattr("roundexport.runtime.benchmarking.process.ContestantProcess", Opening)
    monkeypatch.setattr("roundexport.runtime.bench", bench)
    monkeypatch.setattr(entry, "write_report", lambda *_, **__: None)
    axes = Axes(("rtn",), (4, 2), (32,))
    found = sweep(models("llama"), tmp_path / "out", axes=axes, progress=False)
    assert [row["per second"] for row in found.rows] == [5.0, None] and len(timed) == 1
    assert (tmp_path / "out" / "frontier.json").is_file()


def test_a_disk_that_cannot_hold_a_sweep_is_told(
    models: Models, tmp_path: Path, converting: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 10))
    with pytest.raises(WontFitError, match=r"the sweep takes about .* of disk \(4 artifacts with their packages"):
        sweep(models("llama"), tmp_path / "out", axes=AXES, speed=False, progress=False)
    assert not converting


def test_whole_runs_do_not_go_through_a_store(models: Models, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"do whole runs, .* leave out what follows @"):
        sweep(models("llama"), tmp_path / "out", cluster="local:2@s3://bucket/folder", progress=False)


def test_a_sweep_of_which_nothing_is_left_says_why(models: Models, tmp_path: Path, converting: list[str]) -> None:
    axes = Axes(("default",), (2,), (32,))
    with pytest.raises(RoundexportError, match="no run came to its end; the first failed: this one cannot be made"):
        sweep(models("llama"), tmp_path / "out", axes=axes, speed=False, progress=False)


def test_what_no_other_beats() -> None:
    def row(name: str, size: int, loss: float, model: str = "a") -> Row:
        return Row({"model": model, "recipe": name}, "onnx", Path(name), size, 4.0, loss, None)

    rows = [row("small", 1, 0.9), row("good", 3, 0.1), row("beaten", 4, 0.2), row("other", 9, 0.9, "b")]
    speeds = {"small": 5.0, "good": 9.0, "beaten": 20.0}
    found = {made["recipe"]: made["frontier"] for made in frontiers(rows, speeds)}
    assert found == {"small": "size", "good": "size speed", "beaten": "speed", "other": "size"}
    twins = frontiers([row("one", 1, 0.5), row("two", 1, 0.5)], {})
    assert [made["frontier"] for made in twins] == ["size", "size"], "equal packages do not beat each other"


def test_samples_are_drawn_once(tmp_path: Path) -> None:
    drawn: list[int] = []

    def draw() -> Calibration:
        drawn.append(1)
        return Calibration(np.arange(6).reshape(2, 3), {"kind": "self", "seed": 1}, ("a note",))

    assert samples_once({"model": "m"}, draw).notes == ("a note",)
    with samples_kept(tmp_path / "samples"):
        first, second = (samples_once({"model": "m", "seed": 1}, draw) for _ in range(2))
        samples_once({"model": "m", "seed": 2}, draw)
        path, waited = next((tmp_path / "samples").glob("*.lock")), list[str]()

        @contextmanager
        def waiting() -> Iterator[None]:
            waited.append("said")
            other.release()
            yield

        with (other := FileLock(path)):
            for seed in (1, 2):
                samples_once({"model": "m", "seed": seed}, draw, waiting)
    assert len(drawn) == 3 and waited == ["said"]
    assert (first.ids == second.ids).all() and second.ids.dtype == np.int64
    assert dataclasses.asdict(first)["identity"] == second.identity and second.notes == ("a note",)
