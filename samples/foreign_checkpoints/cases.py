"""Which of a tool's cases are made of a model: those asked for that are not there, and whose groups divide its inputs.

A tool's side gives its cases by name and a function that makes one in a folder.  What fails is told and left out; what
does not divide (groups of 128 and the 576 inputs of SmolLM2) is not a case of that model.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Make = Callable[[str, dict[str, Any], Path], None]


def divides(group: int, model: str) -> bool:
    """Whether groups of a size divide the inputs of all of a model's linears; -1 is a whole row."""
    config = json.loads((Path(model) / "config.json").read_text())
    return group == -1 or not any(config[key] % group for key in ("hidden_size", "intermediate_size"))


def make(
    cases: Mapping[str, dict[str, Any]], make_one: Make, model: str, out: Path, names: Sequence[str], group: str
) -> int:
    """Make cases; returns how many failed.

    Args:
        cases: the tool's settings by name.
        make_one: given a case's name, its settings and a folder that it makes.
        model: folder of the float model.
        out: where folders go, by the case's name.
        names: which; none: all.
        group: the setting that is a group size.
    """
    failed = 0
    for name in names or cases:
        if (out / name).is_dir() or not divides(cases[name].get(group, -1), model):
            continue
        aside = out / f"{name}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            make_one(name, cases[name], aside)
            aside.rename(out / name)
            print(f"made {name}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return failed
