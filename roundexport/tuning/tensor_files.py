"""Safetensors files of a tuning run's state: written whole and synced, their sha256 given; read into memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from roundexport.storage.atomic import sync
from roundexport.storage.checksums import sha256_file
from roundexport.storage.safetensors_reader import TensorFile
from roundexport.storage.safetensors_writer import write_tensors

from .state_folder import FORMAT


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, by name, a copy in memory."""
    file = TensorFile(path)
    return {name: torch.from_numpy(np.array(file.read(name))) for name in file.names}


def write_synced(path: Path, tensors: Mapping[str, tuple[str, np.ndarray[Any, Any]]]) -> str:
    """Write a file and give its sha256.

    Args:
        path: where; a file that is there goes.
        tensors: dtype and values by name.
    """
    path.unlink(missing_ok=True)  # of a run that was killed before it recorded the file
    write_tensors(path, tensors, {"format": FORMAT})
    sync(path.parent)
    return sha256_file(path)
