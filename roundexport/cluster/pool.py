"""`Pool`: what processes.py and ray_actors.py have in common, as workers.py uses it.

A pool has places, numbered from 0.  At each there is one process, which does one message after the other and keeps what
it has open in between.  Where a process dies, its place gets a new one.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol


class Pool(Protocol):
    """Places with a process each."""

    @property
    def places(self) -> int:
        """How many there are."""

    @property
    def died(self) -> tuple[type[BaseException], ...]:
        """What a future raises whose process died."""

    def submit(self, place: int, message: bytes) -> Future[bytes]:
        """Have a message answered (messages.answer) by the process of a place."""

    def restart(self, place: int) -> None:
        """Put a new process in a place whose process died."""

    def close(self) -> None:
        """End all processes, also those that are at work."""

    def describe(self) -> str:
        """How many of what kind, in words."""


@dataclass(frozen=True)
class About:
    """What a worker says of itself.

    Args:
        host: name of its machine.
        pid: its process.
        versions: of the libraries that numbers depend on.
        capability: the instruction set that torch uses.
        threads: it computes with.
    """

    host: str
    pid: int
    versions: dict[str, str]
    capability: str
    threads: int


def prepare(threads: int) -> None:
    """Make this process a worker that computes with so many threads."""
    import os

    from roundexport.environment.threads import VARIABLE

    os.environ[VARIABLE] = str(threads)
    import torch

    torch.set_num_threads(threads)


def about() -> About:
    """What this process is."""
    import os
    import socket

    import torch

    from roundexport.environment.versions import library_versions

    capability = torch.backends.cpu.get_cpu_capability()
    return About(socket.gethostname(), os.getpid(), library_versions(), capability, torch.get_num_threads())
