"""Settings of methods by name: what is read, what is refused, and that they reach the run and its record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from conftest import tuned
from roundexport.algorithms.finishers import end_to_end
from roundexport.algorithms.rounding import gram, rtn
from roundexport.algorithms.transforms import teq, teq_model
from roundexport.errors import UsageError
from roundexport.formats.artifact import Artifact
from roundexport.tuning.method_options import assigned, check_names

Models = Callable[[str], Path]


@pytest.mark.parametrize(
    ("method", "text", "expected"),
    [
        (gram, "gram.keep_size=false", {"keep_size": False}),
        (gram, "gram.damping=0.1", {"damping": 0.1}),
        (gram, "gram.searches=2", {"searches": 2}),
        (end_to_end, "end_to_end.window=2", {"window": 2}),
        (end_to_end, "end_to_end.window=none", {"window": None}),
        (end_to_end, "end_to_end.rate=0", {"rate": 0.0}),
        (teq, "teq.start=ones", {"start": "ones"}),
        (teq_model, "teq_model.loss=cross_entropy", {"loss": "cross_entropy"}),
        (teq, "teq_model.loss=kl", {}),
    ],
)
def test_values_are_read_as_their_fields_are_declared(method: ModuleType, text: str, expected: dict[str, Any]) -> None:
    kind = method.METHOD.settings
    found = assigned(method.__name__.rpartition(".")[2], kind, [text])
    assert found == expected and [type(v) for v in found.values()] == [type(v) for v in expected.values()]
    kind(**found)


@pytest.mark.parametrize(
    ("method", "text", "message"),
    [
        (gram, "gram.dampening=1", "gram has no such setting; it has damping, "),
        (rtn, "rtn.steps=1", "rtn has no such setting"),
        (gram, "gram.keep_size=1", "'1' is none of true or false"),
        (gram, "gram.searches=1.5", "'1.5' is none of a whole number"),
        (end_to_end, "end_to_end.window=two", "'two' is none of a whole number, none"),
        (teq, "teq.start=grids", "'grids' is none of grid or ones"),
        (gram, "gram", "method.field=value"),
        (gram, "damping=1", "method.field=value"),
        (gram, "gram.damping=", "method.field=value"),
    ],
)
def test_what_cannot_be_read_is_refused(method: ModuleType, text: str, message: str) -> None:
    with pytest.raises(UsageError, match="method_settings") as caught:
        assigned(method.__name__.rpartition(".")[2], method.METHOD.settings, [text])
    assert message in str(caught.value)


def test_a_method_that_takes_no_part_is_refused() -> None:
    check_names(["gram.damping=1", "end_to_end.window=1"], ["gram", "end_to_end"])
    with pytest.raises(UsageError, match="teq takes no part in this run; gram, end_to_end do"):
        check_names(["teq.start=ones"], ["gram", "end_to_end"])


def test_they_reach_the_run_and_its_record(models: Models, tmp_path: Path) -> None:
    asked = {"algorithm": "gram", "bits": 2, "group_size": 32, "num_samples": 4, "sample_len": 16}
    plain, other = (
        tuned(models("llama"), tmp_path / name, method_settings=texts, **asked)
        for name, texts in (("plain", ()), ("other", ("gram.keep_size=false", "gram.damping=0.01")))
    )
    recorded = Artifact.open(other).manifest.algorithm["settings"]
    assert recorded["keep_size"] is False and recorded["damping"] == 0.01
    assert Artifact.open(plain).manifest.algorithm["settings"]["keep_size"] is True
    layers = [name for name in Artifact.open(plain).names() if "layers.1.mlp" in name]
    assert layers
    assert not any(Artifact.open(plain).linear(n).equals(Artifact.open(other).linear(n)) for n in layers)
