"""Which of a tool's cases are made of a model: those asked for that are not there, and whose groups divide its inputs.

A tool's side gives its cases by name and a function that makes one in a folder.  What fails is told and left out; what
does not divide (groups of 128 and the 576 inputs of SmolLM2) is not a case of that model.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load_file, save_file

Make = Callable[[str, dict[str, Any], Path], None]


def divides(group: int, model: str) -> bool:
    """Whether groups of a size divide the inputs of all of a model's linears; -1 is a whole row."""
    if group == -1:
        return True
    config = json.loads((Path(model) / "config.json").read_text())
    return not any(config[key] % group for key in ("hidden_size", "intermediate_size"))


@contextmanager
def source(model: str, lm_head: bool) -> Iterator[str]:
    """The model; or a copy of it whose lm_head is a matrix of its own, as tools quantize no tied one."""
    if not lm_head:
        yield model
        return
    with TemporaryDirectory() as apart:
        folder = Path(apart) / "model"
        shutil.copytree(model, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        yield str(folder)


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
            shutil.rmtree(aside, ignore_errors=True)
            print(f"FAILED {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return failed
