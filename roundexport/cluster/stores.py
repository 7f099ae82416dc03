"""Tensors that processes hand each other through an object store, where they see no folder together.

    write    a file here ─▶ <url>/<name>-<host>-<process>-<number>.safetensors, whole from the moment it is there
    read     that ─▶ a file here, mapped; a process keeps the last few of them, as parts of a weight share a problem
    run      everything of a run is below one prefix, which is emptied when a block is begun and when it is done

Any store that fsspec has a client for: s3://…, gs://…, also file:// of a mounted folder.  Every process fetches for
itself, so K × K sums cross the network once per worker that looks at them; a folder that all machines mount is mapped
instead, and is to be preferred where there is one.  Copies are files below TMPDIR while they are in use.
"""

from __future__ import annotations

import itertools
import os
import socket
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from roundexport.errors import RoundexportError, UsageError
from roundexport.model.fetched_folder import is_url

from .tensor_files import read_file, write_file

_KEPT = 4  # files that a process keeps
_numbers: Iterator[int] = itertools.count()  # of files that this process wrote


def check_store(url: str) -> None:
    """Write to a store and remove what was written.

    Raises:
        UsageError: it is not a URL, there is no client for it, or nothing can be written there.
    """
    if not is_url(url):
        raise UsageError(f"{url!r} is not the URL of a store, such as s3://bucket/folder")
    probe = f"{url.rstrip('/')}/roundexport-{socket.gethostname()}-{os.getpid()}"
    try:
        store, path = _opened(probe)
        store.pipe_file(path, b"x")
        store.rm_file(path)
    except ImportError as error:
        raise UsageError(f"{url}: to write there, pip install 'roundexport[stores]' and the store's client") from error
    except Exception as error:  # of the store's client
        raise UsageError(f"{url}: nothing can be written there ({_reason(error)})") from error


@dataclass(frozen=True)
class Stored:
    """Tensors in a store; can be pickled.

    Args:
        url: of the file.
    """

    url: str

    def tensors(self) -> Mapping[str, Tensor]:
        """By name, mapped from a copy; not to be written to."""
        return _copies.tensors(self.url)

    def take(self) -> dict[str, Tensor]:
        """By name, in memory; the file is removed."""
        found = {name: tensor.clone() for name, tensor in self.tensors().items()}
        self.release()
        return found

    def release(self) -> None:
        """Remove the file, here and there."""
        _copies.forget(self.url)
        store, path = _opened(self.url)
        with suppress(FileNotFoundError), _told(self.url):
            store.rm_file(path)


def store_tensors(url: str, name: str, tensors: Mapping[str, Tensor]) -> Stored:
    """Write tensors where other processes can read them.

    Args:
        url: of the run's place in the store.
        name: what they are.
        tensors: by name.

    Raises:
        RoundexportError: the store refuses.
    """
    with tempfile.TemporaryDirectory(prefix="roundexport-") as folder:
        local = Path(folder) / "tensors.safetensors"
        write_file(local, tensors)
        return Stored(_put(local, f"{url}/{name}-{socket.gethostname()}-{os.getpid()}-{next(_numbers):06}.safetensors"))


def store_copy(path: Path, url: str) -> str:
    """Put a file below a run's place in the store; returns its URL.

    Raises:
        RoundexportError: the store refuses.
    """
    return _put(path, f"{url}/{path.name}")


def fetch_copy(url: str, path: Path) -> Path:
    """Put a file of a store here; returns ``path``.

    Raises:
        RoundexportError: the store refuses, or has no such file.
    """
    store, there = _opened(url)
    with _told(url):
        store.get_file(there, str(path))
    return path


def clear_store(url: str) -> None:
    """Remove everything below a run's place in the store."""
    store, path = _opened(url)
    with suppress(FileNotFoundError), _told(url):
        store.rm(path, recursive=True)


class _Copies:
    """What is mapped of the last few files that this process fetched; their copies have no name, so none is left."""

    def __init__(self) -> None:
        self._mapped: OrderedDict[str, Mapping[str, Tensor]] = OrderedDict()

    def tensors(self, url: str) -> Mapping[str, Tensor]:
        """Tensors of a file of a store."""
        if url not in self._mapped:
            with tempfile.TemporaryDirectory(prefix="roundexport-", ignore_cleanup_errors=True) as folder:
                self._mapped[url] = read_file(fetch_copy(url, Path(folder) / "tensors.safetensors"))
            while len(self._mapped) > _KEPT:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(url)
        return self._mapped[url]

    def forget(self, url: str) -> None:
        """Let go of a file."""
        self._mapped.pop(url, None)


_copies = _Copies()


def _put(local: Path, url: str) -> str:
    store, path = _opened(url)
    with _told(url):
        store.makedirs(path.rpartition("/")[0], exist_ok=True)
        store.put_file(str(local), path)
    return url


def _opened(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    found: tuple[Any, str] = url_to_fs(url)
    return found


@contextmanager
def _told(url: str) -> Iterator[None]:
    """What a store's client raises, in words; that something is not there stays as it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # clients of stores raise what they please
        raise RoundexportError(
            f"{url}: the store refuses ({_reason(error)}); look after it, and run the same command again to go on"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
