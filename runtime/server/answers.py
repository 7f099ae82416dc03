"""The answers of one request: handed to the scheduler, and their pieces brought into the event loop as they come.

worker thread:  prompts ─▶ submit ─▶ Scheduler            engine's thread:  Event ─▶ loop.call_soon_threadsafe ─▶
event loop:     async for index, piece in answers         whoever leaves calls cancel, at any time
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from roundexport.runtime.answer import Piece
from roundexport.runtime.sampling import Choice
from roundexport.runtime.scheduler import Event, Failure, Ticket
from roundexport.runtime.scoring import scored
from roundexport.runtime.settings import GenerationSettings
from roundexport.runtime.types import EOS, LENGTH

from .errors import refused
from .models import DecoderModel
from .sse import ClientGone
from .wishes import too_long

_WAITING_S = 15.0  # between signs of life to a client whose answer has not begun


@dataclass(frozen=True)
class Caller:
    """Who asks, and until when.

    Args:
        client: key and address, by which places in the queue are shared out.
        deadline: `asyncio` time at which the request is over.
    """

    client: Hashable
    deadline: float


@dataclass
class Written:
    """What has come of one answer.

    Args:
        text: its pieces.
        choices: its tokens with log-probabilities, if those were asked for.
        tokens: how many, the one that ended it included.
        finished: ``stop`` or ``length``, once it is over.
        first_ns: when its first token was known.
        last_ns: when its last token was known.
    """

    text: list[str] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    tokens: int = 0
    finished: str | None = None
    first_ns: int = 0
    last_ns: int = 0

    def add(self, piece: Piece) -> None:
        """Take a piece in."""
        self.first_ns = self.first_ns or piece.t_ns
        self.last_ns = piece.t_ns
        self.tokens += 1
        if piece.text:
            self.text.append(piece.text)
        if told(piece):
            self.choices.append(piece.choice)
        if piece.finished is not None:
            self.finished = "length" if piece.finished == LENGTH else "stop"


def told(piece: Piece) -> bool:
    """Whether a piece's log-probabilities are told; those of an end-of-sequence token are not, since it has no text."""
    return piece.choice.logprob is not None and piece.finished != EOS


class Answers:
    """The answers of one request; answer ``i`` is to prompt ``i // count``.

    Args:
        model: writes them.
        count: answers per prompt.
        settings: how tokens are chosen and when to stop.
        caller: who asks, and until when.
        on_first: called once with the time of the first token, in `time.perf_counter_ns`.
    """

    def __init__(
        self,
        model: DecoderModel,
        count: int,
        settings: GenerationSettings,
        caller: Caller,
        on_first: Callable[[int], None],
    ) -> None:
        self.model, self.count, self.settings = model, count, settings
        self.prompts: Sequence[Sequence[int]] = ()
        self.written: list[Written] = []
        self.caller, self._on_first = caller, on_first
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._lock = threading.Lock()
        self._gone = False

    async def scored(self, prompts: Sequence[Sequence[int]]) -> list[list[Choice]]:
        """Log-probabilities of prompts, from their second token on.

        Raises:
            FullError: too many are waiting.
            TimeoutError: the request's time is over.
        """
        futures: list[asyncio.Future[list[Choice]]] = []
        try:
            for prompt in prompts:
                futures.append(self._scoring(prompt))
            async with asyncio.timeout_at(self.caller.deadline):
                return list(await asyncio.gather(*futures))
        finally:
            for future in futures:  # nobody waits for the others where one fails, or finds no place
                future.cancel()

    def _scoring(self, prompt: Sequence[int]) -> asyncio.Future[list[Choice]]:
        future: asyncio.Future[list[Choice]] = self._loop.create_future()

        def tell(found: list[Choice] | Exception) -> None:
            if not future.done():
                future.set_exception(found) if isinstance(found, Exception) else future.set_result(found)

        def work() -> Iterator[None]:
            found: list[Choice] = []
            for piece in scored(self.model.decoder.backend, prompt, self.settings.logprobs or 0):
                if future.done():  # nobody waits any more
                    return
                found += piece
                yield
            self._tell(tell, found)

        self.model.scheduler.between(work(), lambda error: self._tell(tell, error))
        return future

    def nothing(self, prompts: Sequence[Sequence[int]]) -> None:
        """Answers of no tokens, for whoever only asks about prompts."""
        self.prompts = prompts
        self.written = [Written(finished="length") for _ in range(len(prompts) * self.count)]

    async def submit(self, prompts: Callable[[], Sequence[Sequence[int]]], named: bool) -> None:
        """Hand everything in; all of it or nothing.

        Args:
            prompts: gives the token ids of each prompt; called in a worker thread, since texts may be long.
            named: the request says how long its answers may be.

        Raises:
            ApiError: a prompt leaves no room for its answers.
            UsageError: a prompt or setting makes no sense for this package.
            FullError: too many are waiting.
            TimeoutError: the request's time was over before its body was here.
        """
        if self._loop.time() >= self.caller.deadline:
            raise TimeoutError
        try:
            await asyncio.to_thread(self._submit, prompts, named)
        except BaseException:
            self.cancel()
            raise

    def _submit(self, prompts: Callable[[], Sequence[Sequence[int]]], named: bool) -> None:
        self.prompts = prompts()
        check_room(self.prompts, self.settings.max_new_tokens, named, self.model.max_context)
        self.written = [Written() for _ in range(len(self.prompts) * self.count)]
        for index in range(len(self.written)):
            with self._lock:
                if self._gone:
                    return
                prompt = self.prompts[index // self.count]
                ticket = self.model.scheduler.submit(
                    prompt, self.settings, self._receiver(index), index, self.caller.client
                )
                self._tickets.append(ticket)

    def check_wanted(self) -> None:
        """For the worker thread that makes prompts.

        Raises:
            ClientGone: nobody waits any more.
        """
        if self._gone:
            raise ClientGone

    def _receiver(self, index: int) -> Callable[[Event], None]:
        def arrived(event: Event) -> None:
            self._tell(self._events.put_nowait, (index, event))

        return arrived

    def _tell(self, take: Callable[[Any], None], value: Any) -> None:
        """Hand something into the event loop."""
        try:
            self._loop.call_soon_threadsafe(take, value)
        except RuntimeError:  # the loop has ended, and with it whoever waited
            pass

    def cancel(self) -> None:
        """Nobody waits any more; does nothing to what is finished."""
        with self._lock:
            self._gone = True
            for ticket in self._tickets:
                ticket.cancel()

    async def pieces(self, waiting: bool = False) -> AsyncIterator[list[tuple[int, Piece]]]:
        """Pieces as they come, those that have come together at once, until every answer is finished.

        Args:
            waiting: also give empty lists, as signs of life, while the first piece is long in coming.

        Raises:
            TimeoutError: the request's time is over.
            Exception: what stopped an engine.
        """
        unfinished, begun = sum(written.finished is None for written in self.written), False
        while unfinished:
            found = [await self._next(None if begun or not waiting else _WAITING_S)]
            while not self._events.empty():
                found.append(self._events.get_nowait())
            pieces = []
            for index, event in (pair for pair in found if pair is not None):
                if isinstance(event, Failure):
                    raise event.error
                if not begun:
                    self._on_first(event.t_ns)
                    begun = True
                self.written[index].add(event)
                unfinished -= event.finished is not None
                pieces.append((index, event))
            yield pieces

    async def finish(self) -> None:
        """Wait until every answer is finished.

        Raises:
            TimeoutError: the request's time is over.
            Exception: what stopped an engine.
        """
        async for _ in self.pieces():
            pass

    async def remember(self, prompt: str) -> None:
        """Keep the tokens of a finished chat, for the turn that goes on from it.

        Args:
            prompt: the rendered prompt.
        """

        def keep() -> None:
            for ticket, written in zip(self._tickets, self.written, strict=True):
                self.model.memory.answered(prompt, ticket.answer, "".join(written.text))

        await asyncio.to_thread(keep)

    async def _next(self, patience: float | None) -> tuple[int, Event] | None:
        """The next event; None if patience ends first."""
        now = self._loop.time()
        until = self.caller.deadline if patience is None else min(self.caller.deadline, now + patience)
        try:
            async with asyncio.timeout_at(until):
                return await self._events.get()
        except TimeoutError:
            if self._loop.time() >= self.caller.deadline:
                raise
            return None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(map(len, self.prompts))

    @property
    def cached_tokens(self) -> int:
        """How many of them were in the cache already."""
        return sum(ticket.answer.reused for ticket in self._tickets[:: self.count])

    @property
    def waits_ns(self) -> list[int]:
        """How long each answer waited for its admission."""
        return [ticket.admitted_ns - ticket.submitted_ns for ticket in self._tickets if ticket.admitted_ns]

    @property
    def new_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(written.tokens for written in self.written)


def check_room(prompts: Sequence[Sequence[int]], asked: int, named: bool, context: int) -> None:
    """Refuse prompts that leave no room for the answers asked for, or none at all where no length was named.

    Raises:
        ApiError: says how many tokens were asked for and how many fit.
    """
    for prompt in prompts:
        if not prompt:
            raise refused("the prompt has no tokens; give it some text")
        least = asked if named else 1
        if len(prompt) + least > context:
            raise too_long(len(prompt), least, context)


def check_bytes(length: int, longest: int, context: int) -> None:
    """Refuse a text that cannot fit whatever its tokens are, before they are sought.

    Args:
        length: characters, of which each is at least a byte.
        longest: bytes of the longest token.
        context: tokens that fit.

    Raises:
        ApiError: says so.
    """
    if length > longest * context:
        raise too_long(-(-length // longest), 1, context)
