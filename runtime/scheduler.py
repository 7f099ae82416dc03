"""Answers for many callers at once: one thread owns the engine, and everybody else hands work in and gets pieces back.

    submit ─▶ waiting (bounded) ─▶ Batch of at most ``rows`` answers ─▶ pieces to each caller

The thread admits what fits, advances the batch, and calls each caller back with what was written; it sleeps while
there is nothing to do.  A caller that leaves is taken out before the next run.  How much fits is counted in tokens of
the cache: prompt and room for the answer of everybody admitted, and of what is kept for prompts that begin alike.

An answer that cannot go on by itself (its grammar, its text) ends alone.  Whatever else fails in a turn of the thread
ends the answers that were being written, and the next ones get a new batch; where there cannot be one, the engine has
stopped: everybody is told, and nothing is taken any more.

Clients share.  The next one is of the client with the fewest answers being written, of these the one that was not
served for longest, and of its own whichever came first.  A full queue is full for whoever has his share of it; another
client's answers find places beyond, until twice as many wait.

Callbacks run in the engine's thread and must return at once (put into a queue).  One that fails is the fault of its
caller, who is let go as if he had left; the log has the kind of error alone, since its text might quote a prompt.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from roundexport.environment.control_groups import memory_free
from roundexport.errors import RoundexportError, UsageError
from roundexport.formats.package import PackageManifest

from .answer import Answer, Piece
from .batch import Batch, Counts
from .generation import Decoder
from .settings import GenerationSettings

_LOG = logging.getLogger("roundexport.scheduler")
PROMPT_TOKENS = 256  # of prompts read per run while others are writing
_SHARE = 0.25  # of the free memory that the cache may take
_KEPT = 0.5  # of the cache's tokens that may stay for prompts that begin alike


class FullError(RoundexportError):
    """More callers are waiting than may; try again after so many seconds."""

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class StoppedError(RoundexportError):
    """The engine has failed for good; its process has to be started anew."""

    def __init__(self) -> None:
        super().__init__("this model's engine has stopped after a failure; the server has to be started anew")


@dataclass(frozen=True)
class Failure:
    """An answer that cannot be finished.

    Args:
        error: what went wrong.
    """

    error: Exception


Event = Piece | Failure
OnEvent = Callable[[Event], None]
OnError = Callable[[Exception], None]


@dataclass(eq=False)
class Ticket:
    """A caller's answer, waiting or being written.

    Args:
        answer: the answer.
        client: whose it is.
        on_event: gets each piece, the last one ``finished``; or a failure, after which nothing comes.
        submitted_ns: `time.perf_counter_ns` of its submission.
        admitted_ns: the same of its admission; 0 while it waits.
        release: called once, when it is over: what its prompt holds may go.
    """

    answer: Answer
    on_event: OnEvent
    submitted_ns: int = field(default_factory=time.perf_counter_ns)
    admitted_ns: int = 0
    cancelled: bool = False
    release: Callable[[], None] = lambda: None
    client: Hashable = None

    @property
    def tokens(self) -> int:
        """Cache that it may come to need."""
        return len(self.answer.tokens) + self.answer.room

    def cancel(self) -> None:
        """Nobody waits for this answer any more; it leaves before the next run."""
        self.cancelled = True

    def tell(self, event: Event) -> None:
        """Hand an event to whoever waits."""
        if not self.cancelled and not _called(self.on_event, event):
            self.cancel()


@dataclass(frozen=True)
class Load:
    """How busy a scheduler is.

    Args:
        waiting: answers not admitted yet, and other work.
        writing: answers being written.
        cache_tokens: tokens in the cache.
        cache_limit: tokens that fit.
    """

    waiting: int
    writing: int
    cache_tokens: int
    cache_limit: int


class Scheduler:
    """Writes answers for many callers with one decoder.

    Args:
        decoder: the opened package; nobody else may use it meanwhile.
        rows: answers written at the same time, at most.
        queue: answers waiting, at most.
        cache_tokens: tokens of all rows together; None: what a quarter of the free memory holds.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        rows: int = 16,
        queue: int = 64,
        cache_tokens: int | None = None,
    ) -> None:
        if rows < 1 or queue < 1 or (cache_tokens is not None and cache_tokens < 1):
            raise UsageError(f"rows, queue and cache tokens must be at least 1, not {rows}, {queue}, {cache_tokens}")
        self.decoder = decoder
        self.cache_limit = cache_tokens or tokens_that_fit(decoder.manifest)
        self._rows, self._queue = rows, queue
        self._waiting: deque[Ticket] = deque()
        self._admitted: dict[Answer, Ticket] = {}
        self._works: deque[tuple[Iterator[object], OnError]] = deque()
        self._changed = threading.Condition()
        self._closing = self._stopped = False
        self._served: dict[Hashable, int] = {}  # when clients that are here were served last
        self._seconds = 1.0  # of an answer lately
        self._used_tokens = 0  # of the cache; noted by the thread that owns the batch, for others to read
        self._batch = self._new_batch()
        self._thread = threading.Thread(target=self._run, name="roundexport-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: Sequence[int],
        settings: GenerationSettings,
        on_event: OnEvent,
        number: int = 0,
        client: Hashable = None,
    ) -> Ticket:
        """Hand in a prompt.

        Args:
            prompt: token ids.
            settings: choice of tokens and end.
            on_event: called in the engine's thread, see `Ticket`.
            number: of the answer among its twins, for the draw.
            client: whose it is; clients share rows and queue.

        Raises:
            UsageError: the prompt cannot be answered, see `Decoder.answer`.
            FullError: too many are waiting.
            StoppedError: the engine has failed for good.
        """
        answer = self.decoder.answer(prompt, settings, number)
        ticket = Ticket(answer, on_event, release=self.decoder.hold(prompt), client=client)
        try:
            with self._changed:
                self._check_open()
                self._check_place(client)
                self._waiting.append(ticket)
                self._changed.notify()
        except BaseException:
            ticket.release()
            raise
        return ticket

    def between(self, work: Iterator[object], on_error: OnError) -> None:
        """Do other work with the decoder's backend, a piece between every two runs.

        Args:
            work: drawn from in the engine's thread until it ends; it must tell its results by itself.
            on_error: called with what ends it before that.

        Raises:
            FullError: too much is waiting.
            StoppedError: the engine has failed for good.
        """
        with self._changed:
            self._check_open()
            if len(self._works) >= self._queue:
                raise FullError(len(self._works), 1)
            self._works.append((work, on_error))
            self._changed.notify()

    @property
    def alive(self) -> bool:
        """Whether answers are written, or will be once some are handed in."""
        return not self._stopped and self._thread.is_alive()

    def _check_open(self) -> None:
        if self._closing:
            raise FullError(len(self._waiting), 1)
        if not self.alive:
            raise StoppedError

    def _check_place(self, client: Hashable) -> None:
        count = len(self._waiting)
        if is_full(Counter(ticket.client for ticket in self._waiting), client, self._queue):
            busy = (count + len(self._admitted)) / self._rows
            raise FullError(count, max(1, math.ceil(busy * self._seconds)))

    @property
    def load(self) -> Load:
        """How busy it is now."""
        return Load(len(self._waiting) + len(self._works), len(self._admitted), self._used_tokens, self.cache_limit)

    @property
    def counts(self) -> Counts:
        """What has been read, reused and written so far."""
        return self._batch.counts

    def close(self, wait_s: float | None = None) -> None:
        """Take nothing new, and end once everything handed in is written, or after so many seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(wait_s)
        if self._thread.is_alive():
            with self._changed:
                for ticket in [*self._waiting, *self._admitted.values()]:
                    ticket.cancel()
            self._thread.join()

    def _new_batch(self) -> Batch:
        keep = int(self.cache_limit * _KEPT)
        return Batch(self.decoder.backend, keep=keep, prompt_tokens=PROMPT_TOKENS, on_error=self._give_up)

    def _run(self) -> None:
        while not self._stopped:
            try:
                if not self._turn():
                    return
            except BaseException as error:  # whatever it is, nobody must wait for a thread that has ended
                self._fail(error)

    def _turn(self) -> bool:
        """One advance, and what comes before and after it; False once nothing is to be done any more."""
        with self._changed:
            while not (self._waiting or self._admitted or self._works or self._closing):
                self._changed.wait()
            if not (self._waiting or self._admitted or self._works):
                self._batch.close()
                return False
            self._let_go()
            self._admit()
        self._work()
        written = self._batch.advance()
        self._used_tokens = self._batch.used_tokens
        for answer, piece in written:
            self._deliver(answer, piece)
        return True

    def _work(self) -> None:
        """A piece of the other work that came first."""
        if not self._works:
            return
        work, on_error = self._works[0]
        try:
            next(work)
        except StopIteration:
            self._works.popleft()
        except BaseException as error:
            self._works.popleft()
            _called(on_error, _told(error))

    def _let_go(self) -> None:
        """Take out whoever was cancelled."""
        for ticket in [ticket for ticket in self._admitted.values() if ticket.cancelled]:
            del self._admitted[ticket.answer]
            ticket.release()
            self._batch.remove(ticket.answer)
        for ticket in [ticket for ticket in self._waiting if ticket.cancelled]:
            self._waiting.remove(ticket)
            ticket.release()

    def _admit(self) -> None:
        """Take in whose clients have least, while there is room; the first always gets in."""
        needed = sum(ticket.tokens for ticket in self._admitted.values())
        while self._waiting and len(self._admitted) < self._rows:
            served = Counter(ticket.client for ticket in self._admitted.values())
            ticket = min(self._waiting, key=lambda ticket: (served[ticket.client], self._served.get(ticket.client, 0)))
            if self._admitted and needed + ticket.tokens > self.cache_limit * (1 - _KEPT):
                return
            needed += ticket.tokens
            ticket.admitted_ns = time.perf_counter_ns()
            self._waiting.remove(ticket)
            self._admitted[ticket.answer] = ticket
            self._served[ticket.client] = ticket.admitted_ns
            here = {ticket.client for ticket in (*self._waiting, *self._admitted.values())}
            self._served = {client: at for client, at in self._served.items() if client in here}
            self._batch.admit(ticket.answer)

    def _deliver(self, answer: Answer, piece: Piece) -> None:
        ticket = self._admitted[answer]
        if piece.finished is not None:
            del self._admitted[answer]
            ticket.release()
            took = (piece.t_ns - ticket.submitted_ns) / 1e9
            self._seconds += 0.2 * (took - self._seconds)
        ticket.tell(piece)

    def _give_up(self, answer: Answer, error: BaseException) -> None:
        """One answer cannot go on; the others do."""
        self._tell([self._admitted.pop(answer)], error)

    def _fail(self, error: BaseException) -> None:
        """A turn failed: everybody in the batch learns it, and the next ones get a new batch, or learn it too."""
        failed, counts = list(self._admitted.values()), self._batch.counts
        self._admitted.clear()
        try:
            self._batch.close()
            self._batch = self._new_batch()
            self._batch.counts = counts
            stopped = not failed  # a turn that fails with nobody in it would fail for ever
        except BaseException:
            stopped = True
        if stopped:
            with self._changed:
                self._stopped = True
                failed += self._waiting
                self._waiting.clear()
                works = list(self._works)
                self._works.clear()
            for _, on_error in works:
                _called(on_error, _told(error))
        self._tell(failed, error)

    @staticmethod
    def _tell(tickets: Sequence[Ticket], error: BaseException) -> None:
        """Nothing more comes for these."""
        for ticket in tickets:
            ticket.release()
            ticket.tell(Failure(_told(error)))


def is_full(held: Counter[Hashable], client: Hashable, places: int) -> bool:
    """Whether a client finds no place: all are taken and he has his share, or twice as many are.

    Args:
        held: places by client; none has zero of them.
        client: who asks for another.
        places: how many there are.
    """
    count, clients = held.total(), len(held.keys() | {client})
    return count >= 2 * places or (count >= places and held[client] >= max(1, places // clients))


def _called(callback: Callable[[Any], None], given: Event | Exception) -> bool:
    """Call what a caller gave; returns whether it came back."""
    try:
        callback(given)
    except BaseException as error:  # of whatever kind: the thread is not his alone
        _LOG.error("a caller's callback failed with %s; it is told nothing more", type(error).__name__)
        return False
    return True


def _told(error: BaseException) -> Exception:
    """An error as one that callers may raise: libraries in other languages panic as what is not an Exception."""
    return error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")


def tokens_that_fit(manifest: PackageManifest) -> int:
    """Tokens of a float32 cache in a quarter of the free memory; at least one row of the longest kind."""
    each = sum(8 * layer["num_kv_heads"] * layer["head_dim"] for layer in manifest.kv)
    return max(manifest.max_context, int(memory_free() * _SHARE / max(each, 1)))
