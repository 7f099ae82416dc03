"""Tensors that processes hand each other, as files of a folder that all of them see.

    <folder>/<name>-<host>-<process>-<number>.safetensors      written aside, then renamed: who finds it finds it whole

Who reads maps the file, so that it is in memory once per machine.  The folder belongs to one block of one run and is
removed when that is done; what a killed run leaves of it is removed before the block is begun again.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from roundexport.storage.disk_errors import explained
from roundexport.storage.safetensors_reader import TensorFile
from roundexport.storage.safetensors_writer import write_tensors

_DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bfloat16: "BF16"}
_numbers: Iterator[int] = itertools.count()  # of files that this process wrote


@dataclass(frozen=True)
class Spilled:
    """Tensors in a file; can be pickled.

    Args:
        path: the file.
    """

    path: Path

    def tensors(self) -> Mapping[str, Tensor]:
        """By name, mapped; writing to them stays in this process."""
        file = TensorFile(self.path)
        return {name: _tensor(file.read(name, private=True), file.dtype(name)) for name in file.names}

    def take(self) -> dict[str, Tensor]:
        """By name, in memory; the file is removed."""
        found = {name: tensor.clone() for name, tensor in self.tensors().items()}
        self.release()
        return found

    def release(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


def spill(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> Spilled:
    """Write tensors where other processes can read them.

    Raises:
        WontFitError: the disk is full.
    """
    path = folder / f"{name}-{socket.gethostname()}-{os.getpid()}-{next(_numbers):06}.safetensors"
    aside = path.with_suffix(".aside")
    with explained(path, aside):
        arrays = {key: (_DTYPES[tensor.dtype], _array(tensor)) for key, tensor in tensors.items()}
        write_tensors(aside, arrays, {"format": "roundexport-parts/1"})
        os.replace(aside, path)
    return Spilled(path)


def _array(tensor: Tensor) -> np.ndarray:
    whole = tensor.detach().cpu().contiguous()
    return whole.view(torch.int16).numpy().view(np.uint16) if whole.dtype == torch.bfloat16 else whole.numpy()


def _tensor(array: np.ndarray, dtype: str) -> Tensor:
    found = torch.from_numpy(array)
    return found.view(torch.bfloat16) if dtype == "BF16" else found
