"""One scoring for several runs: inside `samples_kept` layers that were scored before are not scored again.

Scoring takes as long as the recipe `light`, and rounds of a search for a KL, or runs at several `--target-bits`, ask
for the very same scores.  They are kept in the folder of the samples (calibration/kept_samples.py), under the sha256 of
all that decides them:

    <folder>/<sha256>.scores.json     losses by layer, and which layers share an input

Several processes may ask at once: one scores, the others wait for it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from roundexport.calibration.kept_samples import kept_folder
from roundexport.storage.atomic import replace_file
from roundexport.storage.disk_errors import explained
from roundexport.storage.locks import in_turn
from roundexport.storage.tensor_cache import key_of

from .sensitivity import Scores

_FORMAT = "roundexport-scores/1"


def scores_once(asked: Callable[[], Mapping[str, Any]], take: Callable[[], Scores]) -> Scores:
    """Scores from the folder, or taken and kept there; outside of `samples_kept` they are taken.

    Args:
        asked: all that decides them, as JSON values; called where there is a folder.
        take: scores the layers.
    """
    folder = kept_folder()
    if folder is None:
        return take()
    path = folder / f"{key_of(format=_FORMAT, **asked())}.scores.json"
    with explained(path):
        folder.mkdir(parents=True, exist_ok=True)
        with in_turn(path.with_suffix(".lock")):
            if not path.exists():
                replace_file(path, json.dumps(dataclasses.asdict(take())).encode())
            found = json.loads(path.read_text(encoding="utf-8"))
    losses = {name: tuple(values) for name, values in found["losses"].items()}
    return Scores(losses, tuple(tuple(names) for names in found["sharing"]))
