"""Rows whose layers carry states that cannot be cut back: right wherever they go on, refused everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import runtime_toys as toys

from roundexport.errors import UnsupportedError
from roundexport.runtime import Decoder, GenerationSettings, load
from roundexport.runtime.batch import Batch
from roundexport.runtime.drafting import DraftModel, PromptLookup
from roundexport.runtime.engines._states import EVERY, MOST, Marks
from roundexport.runtime.types import DecoderSession

CLOSE = 1e-4  # of the logits' standard deviation: float32 sums in another order
GREEDY = GenerationSettings(max_new_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module", params=["ort-states", "ov-states"])
def decoder(request: pytest.FixtureRequest, toy: Callable[[str], Path]) -> Decoder:
    found = load(toy(request.param), threads=1, precise=True)
    assert isinstance(found, Decoder)
    return found


@pytest.fixture
def session(decoder: Decoder) -> DecoderSession:
    return decoder.start()


def tokens(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([length, seed]).integers(2, toys.VOCAB, length).tolist()  # type: ignore[no-any-return]


def follows(decoder: Decoder, found: np.ndarray, row: list[int]) -> bool:  # type: ignore[type-arg]
    """Whether these are the logits behind a row that is read as a whole."""
    return close(found, decoder.logits(np.array([row]))[0, -1])


def close(found: np.ndarray, wanted: np.ndarray) -> bool:  # type: ignore[type-arg]
    return bool(np.abs(found - wanted).max() < CLOSE * wanted.std())


def test_rows_grow_come_and_go_in_any_order(decoder: Decoder, session: DecoderSession) -> None:
    one, two, three = session.add(3)
    texts = {one: tokens(9, 1), two: tokens(1, 2), three: tokens(EVERY + 40, 3)}
    session.extend(texts)
    for turn, chosen in enumerate([(three,), (three, one), (two,), (three, two), (one, two, three)]):
        new = {row: tokens(1 + (turn == 3), row + turn) for row in chosen}
        found = session.extend(new).copy()
        for at, row in enumerate(chosen):
            texts[row] = texts[row] + new[row]
            assert follows(decoder, found[at], texts[row])
    session.drop(one)
    [four] = session.add()  # where another was
    assert follows(decoder, session.extend({four: [5, 6]})[0], [5, 6])
    assert not session.cuts


def test_scores_of_a_long_text_are_those_of_the_whole(decoder: Decoder, session: DecoderSession) -> None:
    [row] = session.add()
    text = tokens(2 * EVERY + 9)
    session.extend({row: text[:7]})
    whole = decoder.logits(np.array([text]))[0, 7:]
    assert close(session.scores(row, text[7:]), whole)


def test_a_row_goes_on_from_its_end_from_a_mark_and_from_nothing(decoder: Decoder, session: DecoderSession) -> None:
    [row] = session.add()
    text, new = tokens(2 * EVERY + 30), tokens(3, 1)
    session.extend({row: text})
    wanted = [len(text), len(text) - 1, 2 * EVERY, 2 * EVERY - 1, EVERY - 1]
    assert [session.reach(row, at) for at in wanted] == [len(text), 2 * EVERY, 2 * EVERY, EVERY, 0]
    for at in (len(text), 2 * EVERY, EVERY, 0):
        twin = session.fork(row, at)
        assert session.reach(twin, at - 1) == max(0, (at - 1) // EVERY * EVERY) or at == 0
        assert follows(decoder, session.extend({twin: new})[0], text[:at] + new)
        session.drop(twin)
    session.cut(row, EVERY)
    assert follows(decoder, session.extend({row: new})[0], text[:EVERY] + new)
    session.cut(row, 0)
    assert follows(decoder, session.extend({row: new})[0], new)


def test_elsewhere_it_is_refused_and_nothing_changes(decoder: Decoder, session: DecoderSession) -> None:
    [row] = session.add()
    text = tokens(40)
    session.extend({row: text})
    for act in (session.cut, session.fork):
        with pytest.raises(
            UnsupportedError, match="first 17 tokens: the model carries a state that cannot be cut back"
        ):
            act(row, 17)
    assert session.length(row) == 40
    assert follows(decoder, session.extend({row: [7]})[0], [*text, 7])


def test_answers_that_begin_alike_share_what_can_be_shared(decoder: Decoder) -> None:
    system = tokens(EVERY + 20)
    prompts = [system + tokens(9, 1), system + tokens(5, 2), system + tokens(9, 1)]
    alone = [decoder.greedy([prompt], 6)[0].tolist() for prompt in prompts]
    batch = Batch(decoder.backend, keep=2000)
    answers = [decoder.answer(prompt, GREEDY) for prompt in prompts]
    for answer in answers[:2]:
        batch.admit(answer)
        while len(batch):
            batch.advance()
    turn = decoder.answer([*prompts[0], *alone[0], 9, 9], GREEDY)  # a chat goes on: the row goes on where it ended
    batch.admit(answers[2])
    batch.admit(turn)
    while len(batch):
        batch.advance()
    assert [answer.new_tokens for answer in answers] == alone
    assert [answer.reused for answer in (*answers, turn)] == [0, EVERY, EVERY, len(prompts[0]) + 5]
    assert turn.new_tokens == decoder.greedy([turn.tokens[: turn.prompt_len]], 6)[0].tolist()


def test_guessing_ahead_is_refused(decoder: Decoder) -> None:
    with pytest.raises(UnsupportedError, match="state that cannot be cut back, so guessed tokens"):
        Batch(decoder.backend, drafter=PromptLookup())
    with pytest.raises(UnsupportedError, match="use another draft"):
        DraftModel(decoder.backend, 640)


def test_a_vendors_loop_that_was_not_tried_with_states_is_not_used(toy: Callable[[str], Path]) -> None:
    pytest.importorskip("openvino_genai")
    with pytest.raises(UnsupportedError, match="carry other state than a cache"):
        load(toy("ov-states"), engine="openvino-genai", threads=1)


def test_marks_thin_out_when_there_are_many() -> None:
    marks = Marks()
    for number in range(1, 3 * MOST):
        marks.note(0, number, {})
    assert marks.reach(0, 100, 99) == 3 * MOST - 1
    assert len({marks.reach(0, 100, at) for at in range(100)}) <= MOST + 1
    assert marks.reach(0, 100, 2 * MOST) >= MOST
