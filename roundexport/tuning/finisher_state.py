"""The saved state of a finisher, from which an interrupted run resumes.

    finish-0000k.safetensors    window k: its tensors at a step, the step in the file's metadata; written aside, renamed

A finished window keeps the file of its last step until the run's state folder is removed.  The time of saving depends
on the clock; the result does not, because a resumed step starts from the same numbers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from roundexport.algorithms.finishing import Point
from roundexport.storage.atomic import sync
from roundexport.storage.safetensors_reader import TensorFile
from roundexport.storage.safetensors_writer import write_tensors

FORMAT = "roundexport-finish/1"
_PERIOD_S = 120.0


class FinisherStateFolder:
    """Where a finish writes itself down.

    Args:
        folder: of the run's state; None: nowhere.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._written = time.monotonic()

    def load(self, window: int) -> Point | None:
        """What was written of a window; None where nothing was."""
        if self._folder is None or not self._path(window).exists():
            return None
        file = TensorFile(self._path(window))
        tensors = {name: torch.from_numpy(np.array(file.read(name))) for name in file.names}
        return Point(int(file.metadata["step"]), tensors)

    def due(self) -> bool:
        """Whether it is time to write again."""
        return self._folder is not None and time.monotonic() - self._written > _PERIOD_S

    def save(self, window: int, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a window's tensors, float32, after ``step`` steps, over what was there."""
        if self._folder is None:
            return
        path = self._path(window)
        aside = path.with_suffix(".aside")
        aside.unlink(missing_ok=True)
        values = {name: ("F32", tensor.detach().cpu().numpy()) for name, tensor in tensors.items()}
        write_tensors(aside, values, {"format": FORMAT, "step": str(step)})
        os.replace(aside, path)
        sync(self._folder)
        self._written = time.monotonic()

    def _path(self, window: int) -> Path:
        assert self._folder is not None
        return self._folder / f"finish-{window:05}.safetensors"
