"""One set of samples for several runs: inside `samples_kept` what was drawn before is not drawn again.

A model that writes its own samples takes longer for that than a small one takes to be tuned, and runs that differ in
bits ask for the very same.  Samples are kept in a folder, under the sha256 of all that decides them:

    <folder>/<sha256>.safetensors     ids, or pixels; identity and notes in its metadata

Several processes may ask at once: one draws, the others wait for it.  Samples with sounds are not kept, as
their features are made anew from the files each time.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np

from roundexport.storage.disk_errors import explained
from roundexport.storage.locks import in_turn
from roundexport.storage.safetensors_reader import TensorFile
from roundexport.storage.safetensors_writer import write_tensors
from roundexport.storage.tensor_cache import key_of

from .samples import Calibration

_FORMAT = "roundexport-samples/1"
_FOLDER: ContextVar[Path | None] = ContextVar("kept samples", default=None)


@contextlib.contextmanager
def samples_kept(folder: Path) -> Iterator[None]:
    """While it lasts, `samples_once` keeps samples in a folder, and takes them from there."""
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


def kept_folder() -> Path | None:
    """The folder of the `samples_kept` around the caller; None: there is none."""
    return _FOLDER.get()


def samples_once(
    asked: Mapping[str, Any],
    draw: Callable[[], Calibration],
    waiting: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Calibration:
    """Samples from the folder, or drawn and kept there; outside of `samples_kept` they are drawn.

    Args:
        asked: all that decides them, as JSON values.
        draw: draws them.
        waiting: entered for as long as another process draws them.
    """
    folder = kept_folder()
    if folder is None:
        return draw()
    path = folder / f"{key_of(**asked)}.safetensors"
    with explained(path):
        folder.mkdir(parents=True, exist_ok=True)
        with in_turn(path.with_suffix(".lock"), waiting):
            if not path.exists():
                drawn = draw()
                if drawn.features is not None:
                    return drawn
                _write(path, drawn)
            file = TensorFile(path)
            known = json.loads(file.metadata["identity"]), tuple(json.loads(file.metadata["notes"]))
            return Calibration(np.array(file.read("ids")), *known)


def _write(path: Path, drawn: Calibration) -> None:
    kind = "F32" if drawn.ids.dtype == np.float32 else "I64"
    known = {"identity": json.dumps(drawn.identity), "notes": json.dumps(drawn.notes)}
    aside = path.with_suffix(".aside")
    aside.unlink(missing_ok=True)
    write_tensors(aside, {"ids": (kind, drawn.ids)}, {"format": _FORMAT, **known})
    os.replace(aside, path)
