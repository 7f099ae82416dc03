"""What replays of the float model hold: counted by hand, refused before the work, and not asked for twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tuning_tools import QUICK, Models

from conftest import tuned
from roundexport.conversion.outlook import check_room
from roundexport.environment import memory
from roundexport.errors import WontFitError
from roundexport.model.checkpoint import Checkpoint
from roundexport.tuning import memory_need, planned_run, run
from roundexport.tuning.job import Job
from roundexport.tuning.limits import check_replays
from roundexport.tuning.planned_run import PlannedRun
from roundexport.tuning.settings import TuneSettings

BEST = {"recipe": "best", "num_samples": 8, "sample_len": 64, "group_size": 32}
MIXED = {"recipe": "rtn", "num_samples": 64, "target_bits": 4.0, "choices": (2, 4), "group_size": 32}
ACTIVATIONS = {"recipe": "light", "activations": True, "group_size": 32}


def moments(job: Job, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, float]]]:
    """What is held at once, by the work."""
    found: dict[str, list[dict[str, float]]] = {}
    with monkeypatch.context() as patch:
        patch.setattr(
            memory.MemoryLimit, "check", lambda _, work, *all, advice: found.update({work: [*map(dict, all)]})
        )
        check_replays(job, ())
    return found


def test_what_is_held_is_counted(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job.of(models("llama"), TuneSettings(**BEST))
    config = job.model.config
    hidden, vocabulary, blocks = config.hidden_size, config.vocab_size, config.num_hidden_layers
    tokens = 8 * 64
    output, backward = moments(job, monkeypatch)["measuring what errors of outputs cost"]
    states = 4 * (blocks + 1) * tokens * hidden
    kept = states + 4 * (vocabulary + tokens) * hidden + 4 * tokens * hidden
    assert sum(output.values()) == kept + 4 * 5 * 64 * vocabulary
    block = sum(parameter.numel() for parameter in job.plan.stack.blocks[0].parameters() if parameter.ndim == 2)
    assert backward["a block"] == 4 * block and sum(backward.values()) > kept + 4 * block
    assert "sums of a block" in backward


def test_scores_are_taken_on_few_samples_in_every_scheme(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for choices in ((2, 4), (2, 3, 4, 8)):
        job = Job.of(models("llama"), TuneSettings(**{**MIXED, "choices": choices}))
        _, backward = moments(job, monkeypatch)["scoring layers for bits per layer"]
        hidden, blocks = job.model.config.hidden_size, job.model.config.num_hidden_layers
        assert backward["what enters every block"] == 4 * (blocks + 1) * 24 * 256 * hidden
        sizes.append(next(value for name, value in backward.items() if name.startswith("errors of a block")))
    assert sizes[1] == 2 * sizes[0] > 0
    assert list(moments(Job.of(models("llama"), TuneSettings(**ACTIVATIONS)), monkeypatch)) == [
        "measuring what activations in 8 bits cost"
    ]
    assert not moments(Job.of(models("llama"), TuneSettings(recipe="light", group_size=32)), monkeypatch)


@pytest.mark.parametrize(
    ("asked", "says"),
    [(MIXED, "scoring layers for bits per layer takes .* fewer --choices"),
     (ACTIVATIONS, "measuring what activations in 8 bits cost takes .* leave --activations out")],
)  # fmt: skip
def test_it_is_refused_before_any_text_is_written(
    asked: dict[str, Any], says: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: 1 << 20)
    monkeypatch.setattr(run, "load_calibration", None)
    with pytest.raises(WontFitError, match=says):
        tuned(models("llama"), tmp_path / "out", **{**QUICK, "steps": None, **asked})
    with pytest.raises(WontFitError, match=says):
        check_room(Checkpoint.open(models("llama")), TuneSettings(**asked), tmp_path / "conversion", ["onnx"])


def test_a_conversion_asks_for_no_work_that_its_state_holds(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: 1 << 20)
    (tmp_path / "artifact.partial").mkdir()
    kept = {"mix": {"some": "bits"}, "fisher": False, "activations": {"losses": {}}}
    (tmp_path / "artifact.partial" / "state.json").write_text(json.dumps(kept))
    for asked, work in ((MIXED, "scoring layers"), (ACTIVATIONS, "measuring what activations")):
        with pytest.raises(WontFitError) as refused:  # by what comes after, if at all
            check_room(Checkpoint.open(models("llama")), TuneSettings(**asked), tmp_path, ["onnx"])
        assert work not in str(refused.value)


def test_an_encoder_without_a_head_has_no_logits(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(memory_need.Replays, "check", lambda self, done: asked.append(self.vocabulary))
    for family in ("bert", "llama"):
        memory_need.check_planned(PlannedRun(Checkpoint.open(models(family)), TuneSettings(**BEST)))
    assert asked == [0, Checkpoint.open(models("llama")).config["vocab_size"]]


def test_a_conversion_builds_one_skeleton_to_ask_for_room(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, build = [], planned_run.build_skeleton
    monkeypatch.setattr(planned_run, "build_skeleton", lambda checkpoint: (built.append(1), build(checkpoint))[1])
    for asked, count in ((BEST, 1), (MIXED, 1), ({"recipe": "light", "group_size": 32}, 0)):
        check_room(Checkpoint.open(models("llama")), TuneSettings(**asked), tmp_path / "conversion", ["onnx"])
        assert len(built) == count, asked
        built.clear()


def test_work_that_was_done_is_not_asked_for(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: 1 << 20)
    check_replays(Job.of(models("llama"), TuneSettings(**BEST)), ["outputs"])
    check_replays(Job.of(models("llama"), TuneSettings(**MIXED)), ["scores"])
