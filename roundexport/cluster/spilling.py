"""Tensors that processes hand each other: files of a folder that all of them see, or of an object store.

    <folder>/<name>-<host>-<process>-<number>.safetensors      written aside, then renamed: who finds it finds it whole

Who reads maps the file, so that it is in memory once per machine.  The folder belongs to one block of one run and is
removed when that is done; what a killed run leaves of it is removed before the block is begun again.  A store has a
prefix in a folder's place, see stores.py.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from roundexport.algorithms.parts import Shared
from roundexport.storage.disk_errors import explained

from .stores import clear_store, store_tensors
from .tensor_files import read_file, write_file

_numbers: Iterator[int] = itertools.count()  # of files that this process wrote


@dataclass(frozen=True)
class Place:
    """Where the tensors of a block are shared; can be pickled.

    Args:
        folder: of the block alone, which every process sees; where there is a store, the driver alone.
        store: URL of the run's place in a store; None: the folder is that place.
    """

    folder: Path
    store: str | None = None

    def begin(self) -> None:
        """Make it, empty."""
        self.end()
        self.folder.mkdir(parents=True)

    def end(self) -> None:
        """Remove it, and what is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.store is not None:
            clear_store(self.store)

    def share(self, name: str, tensors: Mapping[str, Tensor]) -> Shared:
        """Put tensors there.

        Raises:
            WontFitError: the disk is full.
            RoundexportError: the store refuses.
        """
        if self.store is None:
            return spill(self.folder, name, tensors)
        return store_tensors(self.store, name, tensors)


@dataclass(frozen=True)
class Spilled:
    """Tensors in a file; can be pickled.

    Args:
        path: the file.
    """

    path: Path

    def tensors(self) -> Mapping[str, Tensor]:
        """By name, mapped; writing to them stays in this process."""
        return read_file(self.path)

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
        write_file(aside, tensors)
        os.replace(aside, path)
    return Spilled(path)
