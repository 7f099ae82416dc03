"""A server of our own in a process of its own, on a free port of this machine, for whoever wants to load it.

with ServerProcess([f"small={folder}"], "--rows", "8") as server:
    httpx.get(f"{server.url}/v1/models")
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from roundexport.errors import RoundexportError

_ADDRESS = re.compile(r" at (http://\S+);")
_LINES = 2000  # of its log that are kept


class ServerProcess:
    """`roundexport serve`, from the moment that it answers until it is stopped.

    Args:
        packages: ``FOLDER`` or ``NAME=FOLDER`` of each.
        options: further words of the command.

    Raises:
        RoundexportError: it did not start; the text has what it said.
    """

    def __init__(self, packages: Sequence[str], *options: str) -> None:
        # -P keeps the current folder off the path: a folder called runtime or kernels there must not be found.
        command = [sys.executable, "-P", "-m", "roundexport.cli.app", "serve", *packages, "--port", "0", *options]
        environment = {**os.environ, "ROUNDEXPORT_API_KEY": "", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace", env=environment)
        self.log: deque[str] = deque(maxlen=_LINES)
        self.url = self._wait()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def stop(self, wait_s: float = 30) -> int:
        """Tell it to end as an operator would, and wait; returns its exit code, -9 where it had to be killed."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._reader.join(5)
        return code

    def _wait(self) -> str:
        """Its address, once it answers."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(line)
            if found := _ADDRESS.search(line):
                return found[1]
        self._process.stderr.close()
        said = "".join(self.log)[-2000:].strip() or "no message"
        raise RoundexportError(f"the server ended with code {self._process.wait()}: {said}")

    def _read(self) -> None:
        """Keep its log, so that it never waits for a reader."""
        with self._process.stderr as lines:  # type: ignore[union-attr]
            self.log.extend(lines)
