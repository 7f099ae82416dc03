"""Answers written together: the same as alone, with prefixes read once, guesses that change nothing, and fair turns."""

from __future__ import annotations

import pytest
import runtime_toys as toys
from batch_toys import GREEDY, alone, tokens

from roundexport.runtime import Decoder, GenerationSettings
from roundexport.runtime.answer import Answer
from roundexport.runtime.batch import Batch, common
from roundexport.runtime.drafting import DraftModel, PromptLookup


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


@pytest.mark.parametrize("width", [0, 1, 63, 64, 65, 200])
@pytest.mark.parametrize("more", [0, 5])
def test_the_common_beginning_is_found_to_the_token(width: int, more: int) -> None:
    begin = list(range(width))
    assert common([*begin, *[7] * more], [*begin, *[8] * 300]) == width
