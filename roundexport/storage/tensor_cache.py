"""Tensors that take minutes to compute and depend on nothing but their key, kept for the next run.

    <cache>/<kind>/<key>.safetensors        see user_cache.py for where the cache is

Written aside and renamed; what is read is held against the sha256 in its metadata, and an entry that is damaged counts
as absent.  A kind is kept below a number of bytes: those that were used longest ago go first.  Where the cache
cannot be written, nothing is kept and nothing fails.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import RoundexportError

from .locks import in_turn
from .safetensors_reader import TensorFile
from .safetensors_writer import write_tensors
from .user_cache import cache_root

_DIGEST, _SUFFIX = "content_sha256", ".safetensors"
Array = NDArray[Any]


def key_of(**parts: object) -> str:
    """A key that changes with every part; parts are JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class TensorCache:
    """Tensors of one kind.

    Args:
        kind: plain name, a folder of the cache.
        max_bytes: kept at most; a larger entry is not kept.
    """

    kind: str
    max_bytes: int = 1 << 30

    def get(self, key: str) -> dict[str, Array] | None:
        """The tensors that were put under a key; None where there are none, or they are damaged."""
        path = self._path(key)
        try:
            file = TensorFile(path)
            found = {name: np.array(file.read(name)) for name in file.names}
            if file.metadata.get(_DIGEST) != _digest(found):
                return None
            os.utime(path)
        except (OSError, RoundexportError):
            return None
        return found

    @contextmanager
    def alone(self, key: str, waiting: Callable[[], AbstractContextManager[object]] = nullcontext) -> Iterator[None]:
        """While it lasts, no other process is in here with the same key, if the folder takes locks.

        Args:
            key: what is asked for.
            waiting: entered for as long as another process is in here, which may take minutes.
        """
        path = self._path(key).with_suffix(".lock")
        with ExitStack() as held:
            with suppress(OSError, NotImplementedError):
                path.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(in_turn(path, waiting))
            yield

    def put(self, key: str, tensors: Mapping[str, tuple[str, Array]]) -> None:
        """Keep tensors (name -> safetensors dtype, values) under a key, if that can be done."""
        arrays = {name: np.asarray(values, order="C") for name, (_, values) in tensors.items()}
        if sum(array.nbytes for array in arrays.values()) > self.max_bytes:
            return
        path = self._path(key)
        aside = path.with_name(f".{key}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = {name: (kind, arrays[name]) for name, (kind, _) in tensors.items()}
            write_tensors(aside, kept, {_DIGEST: _digest(arrays)})
            os.replace(aside, path)
            self._trim(path)
        except (OSError, RoundexportError):
            with suppress(OSError):
                aside.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return cache_root() / self.kind / f"{key}{_SUFFIX}"

    def _trim(self, newest: Path) -> None:
        """Remove what was used longest ago until the rest is below the limit."""
        entries = [(path.stat(), path) for path in newest.parent.glob(f"*{_SUFFIX}")]
        total = sum(stat.st_size for stat, _ in entries)
        for stat, path in sorted(entries, key=lambda entry: entry[0].st_mtime_ns):
            if total <= self.max_bytes or path == newest:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size


def _digest(arrays: Mapping[str, Array]) -> str:
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape} ".encode())
        found.update(np.ascontiguousarray(arrays[name]).data)
    return found.hexdigest()
