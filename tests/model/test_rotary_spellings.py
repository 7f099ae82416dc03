"""Rotary fields of config.json in the spellings of years, which all mean one thing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from roundexport.model.checkpoint import Checkpoint

SCALED = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
THETA = 50_000.0


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": THETA, **SCALED}}, "llama3"),
        ({"rope_theta": THETA, "rope_scaling": {"rope_type": "llama3", **SCALED}}, "llama3"),
        ({"rope_theta": THETA, "rope_scaling": {"type": "llama3", **SCALED}}, "llama3"),
        ({"rope_theta": THETA, "rope_scaling": {"rope_type": "llama3", "type": "llama3", **SCALED}}, "llama3"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}, "default"),
        ({"rope_theta": THETA, "rope_scaling": None}, "default"),
        ({"rope_theta": THETA}, "default"),
    ],
)
def test_every_spelling_gives_the_same_angles(
    told: dict[str, Any], kind: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    config = json.loads((models("llama") / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("rope")}
    folder = Path(shutil.copytree(models("llama"), tmp_path / "m"))
    (folder / "config.json").write_text(json.dumps({**config, **told}))
    found = Checkpoint.open(folder).part_config().rope_parameters
    wanted = {"rope_type": kind, "rope_theta": THETA, **(SCALED if kind == "llama3" else {})}
    assert {key: found.get(key) for key in wanted} == wanted
