"""Work that takes long with a large model, noted where it is done while no stage of a `Progress` says so.

A line every few seconds comes from the stage that is open (roundexport/progress.py), on whatever machine; so what has
to hold is that reading weights, hashing files, running the model and opening packages happen in one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnxruntime
import pytest
import torch

from roundexport.progress import Progress
from roundexport.storage import checksums
from roundexport.storage.safetensors_reader import TensorFile


def notes_silent_work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was done while no stage was open; grows."""
    stages, noted = [0], list[str]()
    begin, drop = Progress.begin, Progress._drop

    def begun(self: Progress, *args: Any, **named: Any) -> Any:
        stages[0] += 1
        return begin(self, *args, **named)

    def dropped(self: Progress, stage: Any) -> None:
        stages[0] -= stage in self._stages
        drop(self, stage)

    def watched(owner: Any, name: str) -> None:
        done: Callable[..., Any] = getattr(owner, name)

        def work(*args: Any, **named: Any) -> Any:
            if not stages[0]:
                noted.append(name)
            return done(*args, **named)

        monkeypatch.setattr(owner, name, work)

    monkeypatch.setattr(Progress, "begin", begun)
    monkeypatch.setattr(Progress, "_drop", dropped)
    watched(TensorFile, "read_float32")
    watched(checksums, "sha256_file")
    watched(torch.nn.Module, "__call__")
    watched(onnxruntime.InferenceSession, "__init__")
    watched(onnxruntime.InferenceSession, "run")
    watched(onnxruntime.InferenceSession, "run_with_iobinding")
    return noted
