"""A speech package in service: one sound after another, in a thread of its own, and none that nobody waits for."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

from roundexport.errors import UsageError
from roundexport.runtime.scheduler import FullError
from roundexport.runtime.speech.results import SpeechSettings, Transcript
from roundexport.runtime.speech.wav import read_wav
from roundexport.runtime.transcription import Transcriber


class _Left(Exception):  # noqa: N818  (not a fault: nobody waits any more)
    """Ends the work in the thread."""


@dataclass(frozen=True)
class SpeechModel:
    """A package that writes down speech, in service.

    Args:
        name: what requests call it.
        package: the package.
        card: what the page shows of it.
        queue: sounds waiting, at most.
    """

    name: str
    package: Transcriber
    card: dict[str, Any]
    queue: int
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "roundexport-speech"))
    _requests: set[object] = field(default_factory=set)

    task = "transcribe"
    alive: ClassVar[bool] = True  # a pool's thread outlives what fails in it
    gives: ClassVar[str] = "transcripts of speech"

    @property
    def max_context(self) -> int:
        """Longest transcript of a window in tokens."""
        return self.package.manifest.max_context

    def busy(self) -> int:
        """Sounds waiting or being written down."""
        return len(self._requests)

    async def transcribe(self, sound: bytes, called: str, settings: SpeechSettings, longest_s: float) -> Transcript:
        """What is said in a WAV file; leaves before the model's next run when it is cancelled.

        Args:
            sound: the file.
            called: its name, for messages.
            settings: language, task, times.
            longest_s: seconds that it may have.

        Raises:
            FullError: too many requests are waiting.
            UsageError: the sound cannot be read or is too long, or the model does not know language or task.
        """
        if len(self._requests) >= self.queue:
            raise FullError(len(self._requests), 1)
        mark, left = object(), threading.Event()

        def between() -> None:
            if left.is_set():
                raise _Left

        def run() -> Transcript:
            between()
            heard = read_wav(sound, called)
            if heard.seconds > longest_s:
                raise UsageError(f"{called}: a sound may have {longest_s:g} seconds here, this one has "
                                 f"{heard.seconds:.0f}; send it in parts")  # fmt: skip
            return self.package.transcribe(heard, settings, between=between)

        self._requests.add(mark)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, run)
        finally:
            left.set()
            self._requests.remove(mark)

    def close(self, wait_s: float) -> None:
        """End its thread, after the sound that it is at."""
        self._thread.shutdown(wait=True, cancel_futures=True)
