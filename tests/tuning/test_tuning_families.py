"""Families that `default` once refused and `rtn` converted: taken, or refused with the argument and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from roundexport import TuneSettings, tune
from roundexport.errors import UnsupportedError
from roundexport.families.configurations import families
from roundexport.families.toy import write_model
from roundexport.formats.artifact import Artifact

QUICK = TuneSettings(group_size=32, num_samples=2, sample_len=16)


def test_a_cache_that_the_model_below_the_head_makes_is_left_out(tmp_path: Path) -> None:
    write_model(families()["granite4_dense"], tmp_path / "m")
    artifact = Artifact.open(tune(tmp_path / "m", tmp_path / "artifact", QUICK, progress=False))
    assert artifact.manifest.algorithm["name"] == "gram"
    assert any(".layers.1." in name and name.endswith("o_proj") for name in artifact.names())


@pytest.mark.parametrize(
    ("family", "argument"), [("gemma3n", "depends on the sample"), ("gemma4", "argument shared_kv_states")]
)
def test_what_a_block_is_given_of_each_sample_is_named_with_the_way_out(
    family: str, argument: str, tmp_path: Path
) -> None:
    write_model(families()[family], tmp_path / "m")
    with pytest.raises(UnsupportedError, match=f"{argument}.*--recipe rtn runs no block"):
        tune(tmp_path / "m", tmp_path / "artifact", QUICK, progress=False)
