"""A contestant's process: requests to it, its memory, and a start with its files on the disk alone.

Memory is read between requests, never while one runs; memory.py says how.

A cold start drops the contestant's files from the page cache first (posix_fadvise), which needs no rights; the
libraries that it imports stay where they are.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from roundexport.errors import RoundexportError

from .contestants import Contestant
from .memory import tree_rss


class ContestantProcess:
    """A contestant, loaded in a process of its own.

    Args:
        contestant: what to start.
        threads: threads of its libraries.

    Raises:
        RoundexportError: it reports an error, or dies.
    """

    def __init__(self, contestant: Contestant, threads: int) -> None:
        self.name = contestant.name
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            contestant.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        self.peak_rss = 0
        try:
            self.loaded = self.ask({"do": "load"})
            self.loaded_rss = tree_rss(self._process.pid)
        except BaseException:
            self.close()
            raise
        self.task: str = self.loaded["task"]
        self.vocab_size: int = self.loaded["vocab_size"]
        self.max_context: int = self.loaded["max_context"]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request.

        Raises:
            RoundexportError: the contestant reports an error, or died.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; the missing reply below tells why
        while (line := self._process.stdout.readline()) and not line.startswith("{"):
            pass  # a library's greeting while it is imported
        self.peak_rss = max(self.peak_rss, tree_rss(self._process.pid, peak=True))
        if not line:
            self._errors.seek(0)
            tail = self._errors.read()[-2000:].strip()
            raise RoundexportError(
                f"contestant {self.name!r} ended with code {self._process.wait()}: {tail or 'no message'}"
            )
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise RoundexportError(f"contestant {self.name!r}: {reply['error']}")
        self.peak_rss = max(self.peak_rss, reply.get("peak_rss", 0))
        return reply

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write('{"do": "quit"}\n')
            self._process.stdin.close()
        except OSError:
            pass  # it died already
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def forget(files: Iterable[Path]) -> bool:
    """Drop files, and those in folders, from the page cache; whether that could be asked for."""
    advise = getattr(os, "posix_fadvise", None)
    found = [path for given in files for path in ([given] if given.is_file() else given.rglob("*")) if path.is_file()]
    if advise is None or not found:
        return False
    for path in found:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)  # pages that were not written yet cannot be dropped
            advise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    return True
