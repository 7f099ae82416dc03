"""A block's task: pickled, and done in a process that knows nothing else, it gives the same bytes."""

from __future__ import annotations

import dataclasses
import pickle  # noqa: TID251  (a task crosses to another process; no file holds it)
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from warm_python import WarmPython

from conftest import tuned
from roundexport.algorithms.transforms import activation_smoothing
from roundexport.model.block_call import BlockCall
from roundexport.tuning import block_loop
from roundexport.tuning.block_task import BlockContext, BlockTask, TunedBlock, run_task

ELSEWHERE = """
import pickle, sys
from pathlib import Path
from roundexport.tuning.block_task import run_task
for name in sys.argv[1:]:
    Path(name).with_suffix(".result").write_bytes(pickle.dumps(run_task(pickle.loads(Path(name).read_bytes()))))
"""
RUNS: dict[str, dict[str, Any]] = {
    "gram": {"algorithm": "gram"},
    "teq": {"algorithm": "rtn", "transform": "teq", "everything": True, "steps": 2},
    "teq_model": {"algorithm": "rtn", "transform": "teq_model", "steps": 2},
    "rtn": {"algorithm": "rtn"},
}


def test_a_task_gives_the_same_bytes_in_a_fresh_process(
    models: Callable[[str], Path], calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    warm: WarmPython,
) -> None:  # fmt: skip
    here: dict[Path, tuple[TunedBlock, Path | None, Path | None]] = {}

    def both(task: BlockTask, context: BlockContext) -> TunedBlock:
        path, own, other = tmp_path / f"{name}-{task.index}.task", None, None
        elsewhere = task
        if task.states is not None:
            copies = {kind: tmp_path / f"{name}-{task.index}.{kind}" for kind in ("before", "after", "kept")}
            shutil.copy(task.states.before, copies["before"])
            shutil.copy(task.states.after, copies["after"])
            states = dataclasses.replace(task.states, before=copies["before"], after=copies["after"])
            elsewhere, own, other = dataclasses.replace(task, states=states), copies["kept"], copies["after"]
        path.write_bytes(pickle.dumps(elsewhere))
        result = run_task(task, context)
        if task.states is not None and own is not None:
            shutil.copy(task.states.after, own)
        here[path] = result, own, other
        return result

    monkeypatch.setattr(block_loop, "run_task", both)
    for name, asked in RUNS.items():
        small = {"num_samples": 4, "sample_len": 16, "batch_size": 2, "calibration": str(calibration_text)}
        tuned(models("llama"), tmp_path / name, **{**small, **asked})
    done = warm.run(f"import torch\ntorch.set_num_threads({torch.get_num_threads()})\n{ELSEWHERE}", *here)
    assert done.returncode == 0, done.stderr
    assert len(here) == 2 * len(RUNS)
    for path, (expected, own, other) in here.items():
        found: TunedBlock = pickle.loads(path.with_suffix(".result").read_bytes())
        assert found.layers.keys() == expected.layers.keys()
        assert all(found.layers[linear].equals(expected.layers[linear]) for linear in expected.layers), path.name
        assert found.overrides.keys() == expected.overrides.keys() and found.vectors.keys() == expected.vectors.keys()
        assert all(torch.equal(found.overrides[key], expected.overrides[key]) for key in expected.overrides)
        assert all((found.vectors[key].values() == expected.vectors[key].values()).all() for key in expected.vectors)
        assert (found.loss_before, found.loss_after) == (expected.loss_before, expected.loss_after)
        if own is not None and other is not None:
            assert own.read_bytes() == other.read_bytes(), f"{path.name}: hidden states differ"
    assert any(result.overrides for result, *_ in here.values()), "teq changed nothing, so nothing was compared"
    assert any(result.vectors for result, *_ in here.values())


@pytest.mark.parametrize(
    ("asked", "forwards"),
    [
        ({"algorithm": "optimal_rtn", "method_settings": ("optimal_rtn.quantized_inputs=false",)}, [2, 2]),
        ({"algorithm": "optimal_rtn", "method_settings": ("optimal_rtn.quantized_inputs=true",)}, [6, 4]),
        ({"algorithm": "rtn", "transform": "activation_smoothing"}, [2, 2]),
    ],
    ids=["inputs of the float model", "inputs through quantized blocks", "a transform that reads float inputs"],
)
def test_no_block_runs_for_outputs_that_nobody_reads(
    asked: dict[str, Any], forwards: list[int], models: Callable[[str], Path], calibration_text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found: list[int] = []
    run = BlockCall.run

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        found[-1] += 1
        return run(*args, **kwargs)

    def counting(task: BlockTask, context: BlockContext) -> TunedBlock:
        found.append(0)
        with monkeypatch.context() as inside:
            inside.setattr(BlockCall, "run", counted)
            return run_task(task, context)

    monkeypatch.setattr(block_loop, "run_task", counting)
    monkeypatch.setattr(activation_smoothing, "find_pairs", lambda *_: ())  # finding them runs a block many times
    small = {"num_samples": 4, "sample_len": 16, "batch_size": 2, "calibration": str(calibration_text)}
    tuned(models("llama"), tmp_path / "out", **asked, **small)
    assert found == forwards
