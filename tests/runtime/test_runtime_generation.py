"""Decoders on both engines: a cache changes nothing, rows do not see each other, generation ends where it must."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runtime_toys as toys

from roundexport.errors import UnsupportedError, UsageError
from roundexport.runtime import Decoder, GenerationSettings, generate, load


@pytest.fixture(params=toys.KINDS)
def decoder(request: pytest.FixtureRequest, toy: Callable[[str], Path]) -> Decoder:
    found = load(toy(request.param), threads=1, precise=True)
    assert isinstance(found, Decoder)
    return found


def prompts(*lengths: int) -> list[list[int]]:
    random = np.random.default_rng(sum(lengths))
    return [random.integers(2, toys.VOCAB, length).tolist() for length in lengths]


def recomputed(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens from whole-sequence logits, without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(decoder.logits(np.array([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("lengths", [(1,), (17,), (300,), (1, 17, 300)], ids=str)
def test_decoding_with_a_cache_equals_recomputing(decoder: Decoder, lengths: tuple[int, ...]) -> None:
    rows = prompts(*lengths)
    found = decoder.greedy(rows, 12)
    assert [row.tolist() for row in found] == [recomputed(decoder, row, 12) for row in rows]


def test_streamed_text_is_the_decoded_text(decoder: Decoder) -> None:
    settings = GenerationSettings(max_new_tokens=60, temperature=1.0, seed=5, ignore_eos=True)
    steps = list(decoder.generate(["The old man", "A"], settings))
    assert len(steps) == 60
    assert [s.finished for s in steps[:-1]] == [(None, None)] * 59 and steps[-1].finished == ("length", "length")
    assert all(a.t_ns < b.t_ns for a, b in pairwise(steps))
    for row in range(2):
        tokens = [step.tokens[row] for step in steps]
        text = "".join(step.text[row] for step in steps)
        assert text == decoder.tokenizer.decode([t for t in tokens if t is not None]).rstrip("\ufffd")


def test_sampling_repeats_with_its_seed_and_rows_are_independent(decoder: Decoder) -> None:
    def run(rows: list[list[int]], seed: int) -> list[tuple[int | None, ...]]:
        settings = GenerationSettings(
            max_new_tokens=8, temperature=1.5, top_k=40, top_p=0.95, seed=seed, ignore_eos=True
        )
        return [step.tokens for step in decoder.generate(rows, settings)]

    rows = prompts(5, 9)
    assert run(rows, 1) == run(rows, 1) != run(rows, 2)
    assert [t[0] for t in run(rows, 1)] == [t[0] for t in run(rows[:1], 1)]


def test_generation_never_exceeds_max_context(decoder: Decoder) -> None:
    rows = prompts(toys.CONTEXT - 4, toys.CONTEXT - 9)
    steps = list(decoder.generate(rows, GenerationSettings(max_new_tokens=50, ignore_eos=True)))
    assert [sum(s.tokens[row] is not None for s in steps) for row in range(2)] == [4, 9]
    assert steps[-1].finished == ("length", "length")


@pytest.mark.parametrize("length", [toys.CONTEXT, toys.CONTEXT + 100])
def test_a_prompt_that_fills_the_context_is_refused_at_the_call(decoder: Decoder, length: int) -> None:
    with pytest.raises(UsageError, match=rf"has {length} tokens and 128 new ones.*max_context is {toys.CONTEXT}"):
        decoder.generate(prompts(length))


@pytest.mark.parametrize(("prompt", "new"), [(31, 1), (32, 1), (33, 1), (31, 2), (1, 10**9)])
def test_what_does_not_fit_is_told_with_its_three_numbers(
    toy: Callable[[str], Path], tmp_path: Path, prompt: int, new: int
) -> None:
    decoder = load(toys.onnx_decoder(tmp_path / "short", max_context=32))
    assert isinstance(decoder, Decoder)
    if prompt + new <= 32:
        assert len(decoder.greedy(prompts(prompt), new)[0]) == new
    else:
        wanted = rf"has {prompt} tokens and {new} new ones were requested.*max_context is 32 for both"
        with pytest.raises(UsageError, match=wanted):
            decoder.greedy(prompts(prompt), new)


def test_a_single_text_is_not_taken_for_a_list_of_characters(decoder: Decoder) -> None:
    with pytest.raises(UsageError, match="put the single prompt into a list"):
        decoder.generate("The old man")


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_rows_of_a_batch_are_answered_like_one_by_one(decoder: Decoder, batch: int) -> None:
    """Lengths from 1 to 17; a row that ends early (its pad is its eos) changes nothing for the others."""
    rows = prompts(1, 3, 4, 9, 16, 17)
    alone = [decoder.greedy([row], 8)[0].tolist() for row in rows]
    for start in range(0, len(rows), batch):
        assert [t.tolist() for t in decoder.greedy(rows[start : start + batch], 8)] == alone[start : start + batch]
    eos = alone[0][1]
    decoder.manifest = replace(decoder.manifest, tokens={"bos": None, "eos": (eos,), "pad": eos})
    steps = list(decoder.generate(rows, GenerationSettings(max_new_tokens=8)))
    for row, wanted in enumerate(alone):
        end = wanted.index(eos) + 1 if eos in wanted else len(wanted)
        assert [s.tokens[row] for s in steps if s.tokens[row] is not None] == wanted[:end]


@pytest.mark.parametrize(
    ("rows", "text"), [([], "no prompt"), ([[]], "no tokens"), ([[5], [toys.VOCAB]], "prompt 2 of 2")]
)
def test_senseless_prompts_are_refused(decoder: Decoder, rows: list[list[int]], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        decoder.generate(rows)


class Scripted:
    """A backend that writes given tokens, whatever it reads."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.script, self.lengths = rows, [0] * len(rows)
        self.asked = [0] * len(rows)

    def start(self, *, rows: int = 1, expected: int = 0) -> Scripted:
        self.next = 0
        return self

    def add(self, count: int = 1) -> list[int]:
        self.next += count
        return list(range(self.next - count, self.next))

    def length(self, row: int) -> int:
        return self.lengths[row]

    def extend(self, new: Any) -> Any:
        tokens = []
        for row, given in new.items():
            self.lengths[row] += len(given)
            tokens.append(self.script[row][min(self.asked[row], len(self.script[row]) - 1)])
            self.asked[row] += 1
        return np.eye(toys.VOCAB, dtype=np.float32)[tokens]

    def drop(self, row: int) -> None:
        pass

    def close(self) -> None:
        pass


def scripted(folder: Path, *texts: str, eos: bool = False) -> Decoder:
    real = load(folder)
    assert isinstance(real, Decoder)
    rows = [real.tokenizer.encode(text) + [toys.EOS] * eos for text in texts]
    return Decoder(Scripted(rows), real.manifest, folder)  # type: ignore[arg-type]


def run(decoder: Decoder, count: int, settings: GenerationSettings) -> tuple[list[str], tuple[str | None, ...]]:
    steps = list(decoder.generate([[5]] * count, settings))
    return ["".join(s.text[row] for s in steps) for row in range(count)], steps[-1].finished


def test_end_of_sequence_ends_a_row_without_text(toy: Callable[[str], Path]) -> None:
    decoder = scripted(toy("ort"), "Good day.", "Yes", eos=True)
    texts, finished = run(decoder, 2, GenerationSettings())
    assert texts == ["Good day.", "Yes"] and finished == ("eos", "eos")


def test_a_finished_row_gives_no_more_tokens(toy: Callable[[str], Path]) -> None:
    decoder = scripted(toy("ort"), "Good day to you all.", "Y", eos=True)
    steps = list(decoder.generate([[5], [5]], GenerationSettings()))
    assert [s.tokens[1] is None for s in steps] == [False, False] + [True] * (len(steps) - 2)


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one two three", (" two",), "one"),
        ("one two three", ("three", "two"), "one "),
        ("aaab", ("ab",), "aa"),
        ("one two", ("two three",), "one two"),  # the beginning of a stop string is shown after all
    ],
)
def test_text_stops_before_a_stop_string(
    toy: Callable[[str], Path], text: str, stop: tuple[str, ...], shown: str
) -> None:
    texts, finished = run(scripted(toy("ort"), text, eos=True), 1, GenerationSettings(stop=stop))
    assert texts == [shown] and finished == ("stop" if shown != text else "eos",)


def test_no_step_shows_half_a_character(toy: Callable[[str], Path]) -> None:
    decoder = scripted(toy("ort"), "naïve 😀 日本", eos=True)
    pieces = [s.text[0] for s in decoder.generate([[5]])]
    assert "".join(pieces) == "naïve 😀 日本"
    assert len([p for p in pieces if not p]) > 5 and not any("\ufffd" in p for p in pieces)


def test_an_answer_cut_inside_a_character_leaves_it_out(toy: Callable[[str], Path]) -> None:
    texts, _ = run(scripted(toy("ort"), "a😀"), 1, GenerationSettings(max_new_tokens=3))
    assert texts == ["a"]


def test_generate_answers_like_the_engine_and_times_it(toy: Callable[[str], Path]) -> None:
    pieces: list[str] = []
    found = generate(toy("ort"), "The old man", max_new_tokens=12, threads=1, on_text=pieces.append)
    decoder = load(toy("ort"), threads=1)
    assert isinstance(decoder, Decoder)
    steps = list(decoder.generate(["The old man"], GenerationSettings(max_new_tokens=12)))
    assert found.tokens == tuple(s.tokens[0] for s in steps)
    assert found.text == "".join(pieces) == "".join(s.text[0] for s in steps)
    assert found.prompt_tokens == len(decoder.encode("The old man"))
    assert found.ttft_ms > 0 and (found.tpot_ms or 0) > 0


def test_generate_refuses_an_encoder(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="is an encoder"):
        generate(toys.onnx_encoder(tmp_path / "encoder"), "Hello")


@pytest.mark.parametrize(
    "values",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"min_p": 2.0}, {"stop": ("",)},
     {"stop": "x"}, {"repetition_penalty": 0.0}, {"seed": -1},
     {"seed": 2**64}, {"temperature": float("inf")}, {"temperature": float("nan")}, {"top_p": float("nan")},
     {"min_p": float("nan")}, {"repetition_penalty": float("inf")}, {"repetition_penalty": float("nan")}],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(values))):
        GenerationSettings(**values)
