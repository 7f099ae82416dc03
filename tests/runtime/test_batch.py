"""Answers written together: the same as alone, with prefixes read once, guesses that change nothing, and fair turns."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import runtime_toys as toys

from roundexport.runtime import Decoder, GenerationSettings, load
from roundexport.runtime.answer import Answer, Piece
from roundexport.runtime.batch import Batch, common
from roundexport.runtime.drafting import DraftModel, PromptLookup
from roundexport.runtime.scheduler import Event, Failure, FullError, Scheduler, StoppedError

GREEDY = GenerationSettings(max_new_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module", params=["ort", "ov"])
def decoder(request: pytest.FixtureRequest, toy: Callable[[str], Path]) -> Decoder:
    found = load(toy(request.param), threads=1, precise=True)
    assert isinstance(found, Decoder)
    return found


def tokens(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([length, seed]).integers(2, toys.VOCAB, length).tolist()  # type: ignore[no-any-return]


def alone(decoder: Decoder, prompt: list[int], count: int = 12) -> list[int]:
    return decoder.greedy([prompt], count)[0].tolist()  # type: ignore[no-any-return]


def finish(batch: Batch, *answers: Answer) -> list[list[int]]:
    for answer in answers:
        batch.admit(answer)
    while len(batch):
        batch.advance()
    return [answer.new_tokens for answer in answers]


def test_answers_that_come_at_different_times_are_those_written_alone(decoder: Decoder) -> None:
    prompts = [tokens(5), tokens(90, 1), tokens(1, 2), tokens(33, 3)]
    answers = [decoder.answer(prompt, GREEDY) for prompt in prompts]
    batch = Batch(decoder.backend, prompt_tokens=16)
    for answer in answers:
        batch.admit(answer)
        for _ in range(3):
            batch.advance()
    while len(batch):
        batch.advance()
    assert [answer.new_tokens for answer in answers] == [alone(decoder, prompt) for prompt in prompts]


def test_one_that_leaves_disturbs_nobody(decoder: Decoder) -> None:
    first, second = (decoder.answer(tokens(20, seed), GREEDY) for seed in (1, 2))
    batch = Batch(decoder.backend)
    batch.admit(first)
    batch.admit(second)
    batch.advance()
    batch.remove(first)
    assert finish(batch) == [] and second.new_tokens == alone(decoder, tokens(20, 2))


def test_a_long_prompt_does_not_stop_the_others(decoder: Decoder) -> None:
    short, long = decoder.answer(tokens(4), GREEDY), decoder.answer(tokens(200, 1), GREEDY)
    batch = Batch(decoder.backend, prompt_tokens=32)
    batch.admit(short)
    batch.advance()
    batch.admit(long)
    turns = 0
    while not long.new_tokens:
        written = batch.advance()
        turns += 1
        assert short in [answer for answer, _ in written] or short.finished
    assert turns == 7 and batch.counts.read == 4 + 200  # 200 tokens in pieces of 32


def test_prompts_that_nobody_waits_behind_are_read_in_pieces_too(decoder: Decoder) -> None:
    answers = [decoder.answer(tokens(200, seed), GREEDY) for seed in (1, 2)]
    batch = Batch(decoder.backend, prompt_tokens=32)
    for answer in answers:
        batch.admit(answer)
    for turn in range(1, 4):
        assert batch.advance() == [] and batch.counts.read == 64 * turn
    batch.remove(answers[1])
    assert [answer for answer, _ in batch.advance()] == answers[:1] and batch.counts.read == 200
    assert finish(batch) == [] and answers[0].new_tokens == alone(decoder, tokens(200, 1))


def test_a_chat_reads_no_token_twice(decoder: Decoder) -> None:
    batch = Batch(decoder.backend, keep=1000)
    row = tokens(40)
    for turn in range(5):
        answer = decoder.answer(row, GREEDY)
        [new] = finish(batch, answer)
        assert new == alone(decoder, row)
        row = [*row, *new, *tokens(6, turn + 1)]
    # The first prompt, then each turn's own six tokens and the last one written, which no run has read yet.
    assert batch.counts.read == 40 + 4 * 7


def test_twins_share_their_prompt(decoder: Decoder) -> None:
    batch, prompt = Batch(decoder.backend), tokens(100)
    found = finish(batch, *(decoder.answer(prompt, GREEDY, number) for number in range(4)))
    assert found == [alone(decoder, prompt)] * 4
    assert batch.counts.read == 100 + 3 and batch.counts.reused == 3 * 99


def test_a_kept_prefix_serves_two_that_go_different_ways(decoder: Decoder) -> None:
    batch, system = Batch(decoder.backend, keep=1000), tokens(64)
    finish(batch, decoder.answer(system, GREEDY))
    prompts = [system + tokens(5, seed) for seed in (1, 2)]
    assert finish(batch, *(decoder.answer(p, GREEDY) for p in prompts)) == [alone(decoder, p) for p in prompts]
    assert batch.counts.read == 64 + 2 * 5


def test_no_more_is_kept_than_asked(decoder: Decoder) -> None:
    batch = Batch(decoder.backend, keep=100)
    for seed in range(4):
        finish(batch, decoder.answer(tokens(40, seed), GREEDY))
        assert batch.kept_tokens <= 100
    assert batch.kept_tokens == 40 + 11


def test_no_more_rows_are_kept_than_may_be(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roundexport.runtime.batch.KEPT_ROWS", 2)
    batch, few = Batch(decoder.backend, keep=1000), GenerationSettings(max_new_tokens=1, ignore_eos=True)
    for seed in (1, 2, 3, 1):  # the first one has gone by the time it is asked for again
        finish(batch, decoder.answer(tokens(20, seed), few))
    assert batch.kept_tokens == 40 and batch.counts.reused == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["lookup", "itself", "nonsense"])
def test_guesses_change_nothing_and_save_runs(decoder: Decoder, kind: str, temperature: float) -> None:
    class Nonsense:
        def guess(self, row: object, most: int) -> list[int]:
            return [5, 6, 7][:most]

    drafters = {
        "lookup": PromptLookup(shortest=1),
        "itself": DraftModel(decoder.backend, toys.CONTEXT),
        "nonsense": Nonsense(),
    }
    settings = GenerationSettings(max_new_tokens=40, ignore_eos=True, temperature=temperature, seed=3)
    prompt = tokens(8) * 4
    plain, drafted = Batch(decoder.backend), Batch(decoder.backend, drafter=drafters[kind])
    assert finish(plain, decoder.answer(prompt, settings)) == finish(drafted, decoder.answer(prompt, settings))
    assert plain.counts.runs == 40
    assert drafted.counts.runs == 40 - drafted.counts.accepted
    if kind == "itself" and temperature == 0:
        assert drafted.counts.accepted > 30  # it is never wrong, but for sums in another order


@pytest.mark.parametrize(
    ("row", "most", "wanted"),
    [
        ([1, 2, 3, 9, 1, 2], 8, [3, 9, 1, 2]),
        ([1, 2, 3, 9, 1, 2], 1, [3]),
        ([1, 2, 7, 1, 2, 8, 1, 2], 8, [8, 1, 2]),  # the latest place
        ([1, 2, 3, 4], 8, []),
        ([5], 8, []),
    ],
)
def test_prompt_lookup_finds_what_followed_before(row: list[int], most: int, wanted: list[int]) -> None:
    assert PromptLookup(count=8).guess(row, most) == wanted


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


@pytest.mark.parametrize("width", [0, 1, 63, 64, 65, 200])
@pytest.mark.parametrize("more", [0, 5])
def test_the_common_beginning_is_found_to_the_token(width: int, more: int) -> None:
    begin = list(range(width))
    assert common([*begin, *[7] * more], [*begin, *[8] * 300]) == width
