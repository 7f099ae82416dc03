"""Rows of a session that come, grow, are cut back, copied and go: against whole sequences, on every kind of session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import runtime_toys as toys

from roundexport.errors import UsageError
from roundexport.runtime import Decoder, load
from roundexport.runtime.engines import ov
from roundexport.runtime.types import DecoderSession

# float32 sums in another order; logits of the toy are around 30
CLOSE = 1e-3


@pytest.fixture(scope="module", params=["ort", "ov", "ov-stateful"])
def decoder(request: pytest.FixtureRequest, toy: Callable[[str], Path]) -> Decoder:
    engine, _, stateful = request.param.partition("-")
    with pytest.MonkeyPatch.context() as patch:
        if stateful:
            patch.setattr(ov, "paged", lambda model: None)
        found = load(toy(engine), threads=1, precise=True)
    assert isinstance(found, Decoder)
    assert found.info().get("attention", "") == {"ort": "", "ov": "paged", "ov-stateful": "stateful"}[request.param]
    return found


@pytest.fixture
def session(decoder: Decoder) -> DecoderSession:
    return decoder.start()


def tokens(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([length, seed]).integers(2, toys.VOCAB, length).tolist()  # type: ignore[no-any-return]


def whole(decoder: Decoder, row: list[int]) -> np.ndarray:  # type: ignore[type-arg]
    """Logits [S, V] of a sequence, in a session of its own."""
    return decoder.logits(np.array([row]))[0]


def close(found: np.ndarray, wanted: np.ndarray) -> bool:  # type: ignore[type-arg]
    return bool(np.abs(found - wanted).max() < CLOSE)


def test_rows_of_unequal_length_grow_by_any_number_of_tokens(decoder: Decoder, session: DecoderSession) -> None:
    rows = session.add(3)
    texts: dict[int, list[int]] = {row: [] for row in rows}
    for counts in [(1, 17, 300), (5, 1, 2), (1, 1, 1), (40, 3, 1), (1, 1, 1)]:
        new = {row: tokens(count, row) for row, count in zip(rows, counts, strict=True)}
        found = session.extend(new).copy()
        for at, row in enumerate(rows):
            texts[row] += new[row]
            assert session.length(row) == len(texts[row])
            assert close(found[at], whole(decoder, texts[row])[-1])


def test_some_rows_grow_while_others_wait(decoder: Decoder, session: DecoderSession) -> None:
    one, two, three = session.add(3)
    texts = {one: tokens(9, 1), two: tokens(4, 2), three: tokens(6, 3)}
    session.extend(texts)
    for chosen in [(three,), (three, one), (two,), (three, two), (one, two, three)]:
        new = {row: tokens(1, row) for row in chosen}
        found = session.extend(new).copy()
        for at, row in enumerate(chosen):
            texts[row] = texts[row] + new[row]
            assert close(found[at], whole(decoder, texts[row])[-1])


def test_rows_come_and_go_while_others_stay(decoder: Decoder, session: DecoderSession) -> None:
    one, two, three = session.add(3)
    texts = {row: tokens(5 + row, row) for row in (one, two, three)}
    session.extend(texts)
    session.drop(one)
    texts.pop(one)
    [four] = session.add()
    for turn in range(2):
        new = {three: tokens(1, turn), four: tokens(7, turn), two: tokens(1, turn + 9)}
        found = session.extend(new).copy()
        for at, row in enumerate(new):
            texts[row] = texts.get(row, []) + new[row]
            assert close(found[at], whole(decoder, texts[row])[-1])
    with pytest.raises(UsageError, match="never added, or was dropped"):
        session.length(one)


@pytest.mark.parametrize("at", [1, 31, 32, 33, 64])
def test_a_fork_goes_its_own_way(decoder: Decoder, session: DecoderSession, at: int) -> None:
    [row] = session.add()
    text = tokens(70)
    session.extend({row: text})
    twin = session.fork(row, at)
    assert session.length(twin) == at
    other, more = tokens(3, 1), tokens(2, 2)
    found = session.extend({twin: other, row: more}).copy()
    assert close(found[0], whole(decoder, text[:at] + other)[-1])
    assert close(found[1], whole(decoder, text + more)[-1])


def test_a_fork_outlives_its_source(decoder: Decoder, session: DecoderSession) -> None:
    [row] = session.add()
    text = tokens(40)
    session.extend({row: text})
    twin = session.fork(row, 40)
    session.drop(row)
    [new] = session.add()
    session.extend({new: tokens(50, 5)})  # takes what was free
    assert close(session.extend({twin: [7]})[0], whole(decoder, [*text, 7])[-1])


@pytest.mark.parametrize("at", [0, 1, 32, 39])
def test_a_row_that_was_cut_goes_on_as_if_it_had_never_been_longer(
    decoder: Decoder, session: DecoderSession, at: int
) -> None:
    [row] = session.add()
    text, other = tokens(40), tokens(5, 1)
    session.extend({row: text})
    session.cut(row, at)
    assert close(session.extend({row: other})[0], whole(decoder, text[:at] + other)[-1])


def test_scores_are_the_logits_behind_every_token(decoder: Decoder, session: DecoderSession) -> None:
    one, two = session.add(2)
    text, more = tokens(20), tokens(6, 1)
    session.extend({two: tokens(3), one: text})
    assert close(session.scores(one, more), whole(decoder, text + more)[20:])


def test_a_long_prompt_in_pieces_equals_one_piece(decoder: Decoder, session: DecoderSession) -> None:
    [row] = session.add()
    text = tokens(620)  # more than one chunk of every engine
    session.extend({row: text[:90]})
    assert close(session.extend({row: text[90:]})[0], whole(decoder, text)[-1])


def test_the_cache_grows_past_what_was_expected(decoder: Decoder) -> None:
    text = tokens(250)
    with decoder.start(rows=1, expected=250) as session:
        rows = session.add(3)
        session.extend({row: text for row in rows})
        for token in tokens(20, 1):  # 256 are allocated first
            text.append(token)
            found = session.extend({row: [token] for row in rows})
        assert all(close(values, whole(decoder, text)[-1]) for values in found)


def test_two_sessions_at_once_do_not_mix(decoder: Decoder) -> None:
    first, second = tokens(9), tokens(12)
    with decoder.start() as one, decoder.start() as two:
        pairs = [(session, *session.add(), text) for session, text in ((one, first), (two, second))]
        for session, row, text in pairs:
            session.extend({row: text[:-1]})
        assert all(close(session.extend({row: text[-1:]})[0], whole(decoder, text)[-1]) for session, row, text in pairs)


@pytest.mark.parametrize(("new", "why"), [([], "gets no token"), ([5] * 5000, "exceed this package's max_context")])
def test_what_a_row_cannot_take_is_refused_and_changes_nothing(
    decoder: Decoder, session: DecoderSession, new: list[int], why: str
) -> None:
    one, two = session.add(2)
    session.extend({one: [5, 6]})
    with pytest.raises(UsageError, match=why):
        session.extend({two: [5], one: new})
    with pytest.raises(UsageError, match=why):
        session.scores(one, new)
    assert (session.length(one), session.length(two)) == (2, 0)
    assert close(session.extend({one: [7]})[0], whole(decoder, [5, 6, 7])[-1])


def test_steps_past_the_width_of_a_mask_and_back_again(decoder: Decoder, session: DecoderSession) -> None:
    """A mask is made for some lengths at once; rows that outgrow it, fall back, or meet another's place in it."""
    one, two = session.add(2)
    texts = {one: tokens(61, 1), two: tokens(64, 2)}
    session.extend(texts)
    for count, cut in [(4, None), (1, 30), (3, None), (1, 0)]:
        for _ in range(count):
            new = {row: tokens(1, row + len(text)) for row, text in texts.items()}
            found = session.extend(new).copy()
            texts = {row: text + new[row] for row, text in texts.items()}
        for at, row in enumerate(texts):
            assert close(found[at], whole(decoder, texts[row])[-1])
        if cut is not None:
            session.cut(two, cut)
            texts[two] = texts[two][:cut]
