"""Answers for many callers: those that they would get alone, fair turns, and an end for everybody whatever happens."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import pytest
from batch_toys import GREEDY, alone, tokens

from roundexport.runtime import Decoder, GenerationSettings
from roundexport.runtime.answer import Answer, Piece
from roundexport.runtime.batch import Batch
from roundexport.runtime.scheduler import Event, Failure, FullError, Scheduler, StoppedError, Ticket


class Caller:
    """Collects what a scheduler tells."""

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()

    def pieces(self) -> Iterator[Piece]:
        while True:
            event = self.events.get(timeout=30)
            assert isinstance(event, Piece), event
            yield event
            if event.finished:
                return

    def tokens(self) -> list[int]:
        return [piece.choice.token for piece in self.pieces()]


def test_many_callers_get_the_answers_they_would_get_alone(decoder: Decoder) -> None:
    scheduler = Scheduler(decoder, rows=3, cache_tokens=2000)
    prompts = [tokens(10 + seed, seed) for seed in range(8)]
    callers = [Caller() for _ in prompts]
    for prompt, caller in zip(prompts, callers, strict=True):
        scheduler.submit(prompt, GREEDY, caller.events.put)
    assert [caller.tokens() for caller in callers] == [alone(decoder, prompt) for prompt in prompts]
    scheduler.close()
    assert scheduler.load.waiting == scheduler.load.writing == 0


def test_a_full_queue_says_when_to_come_again(decoder: Decoder) -> None:
    scheduler = Scheduler(decoder, rows=1, queue=1)
    long = GenerationSettings(max_new_tokens=600, ignore_eos=True)
    first = Caller()
    tickets = [scheduler.submit(tokens(4), long, first.events.put)]
    next(first.pieces())  # it is being written, so the queue is empty again
    tickets.append(scheduler.submit(tokens(4), long, Caller().events.put))
    with pytest.raises(FullError, match="1 requests are waiting") as refused:
        scheduler.submit(tokens(4), long, Caller().events.put)
    assert refused.value.retry_after_s >= 1
    for ticket in tickets:
        ticket.cancel()
    scheduler.close()


def test_clients_share_rows_and_queue(decoder: Decoder) -> None:
    scheduler, done = Scheduler(decoder, rows=1, queue=4), Caller()

    def submit(client: str) -> Ticket:
        few = GenerationSettings(max_new_tokens=1, ignore_eos=True)
        return scheduler.submit(tokens(4), few, done.events.put, client=client)

    with scheduler._changed:  # all of it is there when the thread looks
        greedy = [submit("greedy") for _ in range(4)]
        with pytest.raises(FullError):
            submit("greedy")
        modest, again, late = (submit(name) for name in ("modest", "modest", "late"))
        for name in ("modest", "greedy"):  # who have their shares
            with pytest.raises(FullError):
                submit(name)
        fourth = submit("fourth")
        with pytest.raises(FullError, match="8 requests"):
            submit("fifth")
    for _ in range(8):
        assert isinstance(done.events.get(timeout=30), Piece)
    scheduler.close()
    order = sorted([*greedy, modest, again, late, fourth], key=lambda ticket: ticket.admitted_ns)
    assert order == [greedy[0], modest, late, fourth, greedy[1], again, *greedy[2:]]


def test_the_next_row_is_for_the_client_that_has_least(decoder: Decoder) -> None:
    scheduler, done = Scheduler(decoder, rows=2), Caller()
    with scheduler._changed:
        first, second, third = (
            scheduler.submit(tokens(4, seed), GREEDY, done.events.put, client=client)
            for seed, client in enumerate(("greedy", "greedy", "modest"))
        )
    list(zip(range(36), iter(lambda: done.events.get(timeout=30), None), strict=False))
    scheduler.close()
    assert first.admitted_ns < third.admitted_ns < second.admitted_ns


def test_a_cancelled_answer_makes_room(decoder: Decoder) -> None:
    scheduler, first, second = Scheduler(decoder, rows=1), Caller(), Caller()
    ticket = scheduler.submit(tokens(4), GenerationSettings(max_new_tokens=600, ignore_eos=True), first.events.put)
    scheduler.submit(tokens(5), GREEDY, second.events.put)
    ticket.cancel()
    assert second.tokens() == alone(decoder, tokens(5))
    scheduler.close()


def test_what_a_prompt_holds_is_let_go_however_it_ends(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    def hold(prompt: list[int]) -> Callable[[], None]:
        held.append(len(prompt))
        return lambda: held.remove(len(prompt))

    def broken(self: Batch) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(decoder, "hold", hold)
    scheduler, callers = Scheduler(decoder, rows=1, queue=1), [Caller() for _ in range(3)]
    long = GenerationSettings(max_new_tokens=600, ignore_eos=True)
    first = scheduler.submit(tokens(4), long, callers[0].events.put)
    next(callers[0].pieces())
    second = scheduler.submit(tokens(5), GREEDY, callers[1].events.put)
    with pytest.raises(FullError):
        scheduler.submit(tokens(6), GREEDY, Caller().events.put)
    assert held == [4, 5]
    second.cancel()  # while it waits
    while held != [4]:
        next(callers[0].pieces())
    scheduler.submit(tokens(7), GREEDY, callers[2].events.put)
    assert held == [4, 7]
    first.cancel()  # while it is written
    assert len(callers[2].tokens()) == 12 and held == []
    monkeypatch.setattr(Batch, "advance", broken)
    scheduler.submit(tokens(8), GREEDY, callers[1].events.put)
    assert isinstance(callers[1].events.get(timeout=30), Failure) and held == []
    scheduler.close()


def test_an_engine_that_fails_tells_everybody_and_goes_on(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(decoder, rows=2)
    first, second = Caller(), Caller()

    def broken(self: Batch) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "advance", broken)
        scheduler.submit(tokens(4), GREEDY, first.events.put)
        event = first.events.get(timeout=30)
        assert isinstance(event, Failure) and "out of luck" in str(event.error)
    scheduler.submit(tokens(4), GREEDY, second.events.put)
    assert second.tokens() == alone(decoder, tokens(4))
    scheduler.close()


def test_other_work_takes_turns_with_answers(decoder: Decoder) -> None:
    scheduler, caller, turns = Scheduler(decoder, queue=2), Caller(), []

    def work(count: int) -> Iterator[None]:
        for turn in range(count):
            turns.append((turn, scheduler.counts.runs))
            yield
        raise RuntimeError("out of luck")

    told: queue.Queue[Exception] = queue.Queue()
    ticket = scheduler.submit(tokens(4), GenerationSettings(max_new_tokens=600, ignore_eos=True), caller.events.put)
    next(caller.pieces())
    scheduler.between(work(3), told.put)
    scheduler.submit(tokens(5), GREEDY, caller.events.put)
    while len(turns) < 3:
        next(caller.pieces())
    runs = [at for _, at in turns]
    assert [turn for turn, _ in turns] == [0, 1, 2] and runs == sorted(set(runs))  # a run between any two
    assert str(told.get(timeout=30)) == "out of luck"
    ticket.cancel()
    scheduler.close()
    with pytest.raises(FullError):
        scheduler.between(work(1), told.put)


class Panic(BaseException):
    """What libraries in other languages raise."""


@pytest.mark.parametrize("error", [ValueError, Panic])
def test_an_answer_that_cannot_go_on_ends_alone(decoder: Decoder, error: type[BaseException]) -> None:
    class Broken(Answer):
        def take(self, logits: object) -> Piece:
            raise error("a grammar of its own")

    scheduler, first, second = Scheduler(decoder, rows=2), Caller(), Caller()
    good = decoder.answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            decoder,
            "answer",
            lambda prompt, settings, number: Broken(prompt, settings, decoder.manifest, decoder.tokenizer),
        )
        scheduler.submit(tokens(4), GREEDY, first.events.put)
        patch.setattr(decoder, "answer", good)
        scheduler.submit(tokens(5), GREEDY, second.events.put)
    event = first.events.get(timeout=30)
    assert isinstance(event, Failure) and "a grammar of its own" in str(event.error)
    assert second.tokens() == alone(decoder, tokens(5)) and scheduler.alive
    scheduler.close()


@pytest.mark.parametrize("place", ["_let_go", "_admit", "_deliver"])
def test_a_turn_that_fails_anywhere_leaves_nobody_waiting(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def broken(*given: object) -> None:
        raise Panic("out of luck")

    scheduler, caller = Scheduler(decoder, rows=2), Caller()
    monkeypatch.setattr(scheduler, place, broken)
    scheduler.submit(tokens(4), GREEDY, caller.events.put)
    event = caller.events.get(timeout=30)
    assert isinstance(event, Failure) and "out of luck" in str(event.error)
    monkeypatch.undo()
    if place == "_deliver":  # those admitted have learned it, and the next ones get a new batch
        scheduler.submit(tokens(4), GREEDY, caller.events.put)
        assert caller.tokens() == alone(decoder, tokens(4))
    else:  # it would fail for ever
        with pytest.raises(StoppedError):
            scheduler.submit(tokens(4), GREEDY, caller.events.put)
        assert not scheduler.alive
    scheduler.close()


@pytest.mark.parametrize("at", ["a token", "the end"])
def test_a_caller_that_fails_is_let_go_and_nobody_else_notices(decoder: Decoder, at: str) -> None:
    """Alone and beside another, in the middle and with the last piece, after which nobody is being written."""
    scheduler, other, called = Scheduler(decoder, rows=2), Caller(), threading.Event()

    def fails(event: Event) -> None:
        assert isinstance(event, Piece)
        if at == "a token" or event.finished:
            called.set()
            raise Panic("the caller's loop is closed")

    few = GenerationSettings(max_new_tokens=3, ignore_eos=True)
    scheduler.submit(tokens(4), few, fails)
    assert called.wait(30)
    called.clear()
    scheduler.submit(tokens(4), few, fails)
    scheduler.submit(tokens(5), GREEDY, other.events.put)
    assert other.tokens() == alone(decoder, tokens(5))
    assert called.is_set() and scheduler.alive
    scheduler.close()
    assert scheduler.load.writing == 0


def test_a_caller_that_fails_keeps_no_failure_from_the_others(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object) -> None:
        raise RuntimeError("out of luck")

    scheduler, other = Scheduler(decoder, rows=2), Caller()
    monkeypatch.setattr(Batch, "advance", broken)
    with scheduler._changed:
        scheduler.submit(tokens(4), GREEDY, broken)
        scheduler.submit(tokens(4), GREEDY, other.events.put)
    assert isinstance(other.events.get(timeout=30), Failure)
    monkeypatch.undo()
    scheduler.between(map(broken, [1]), broken)
    scheduler.submit(tokens(4), GREEDY, other.events.put)
    assert other.tokens() == alone(decoder, tokens(4))
    scheduler.close()


def test_an_engine_that_cannot_start_anew_has_stopped(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, callers, told = Scheduler(decoder, rows=1), [Caller(), Caller()], Caller()

    def broken(*given: object, **settings: object) -> None:
        raise MemoryError

    monkeypatch.setattr("roundexport.runtime.scheduler.Batch", broken)
    monkeypatch.setattr(Batch, "advance", broken)
    with scheduler._changed:  # all of it is there when the thread looks
        for caller in callers:
            scheduler.submit(tokens(4), GREEDY, caller.events.put)
        scheduler.between(iter(range(100)), lambda error: told.events.put(Failure(error)))
    for caller in (*callers, told):
        event = caller.events.get(timeout=30)
        assert isinstance(event, Failure) and isinstance(event.error, MemoryError)
    assert not scheduler.alive
    scheduler.close()
