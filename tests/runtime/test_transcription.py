"""Windows, prompts and pieces of a transcript; what the model would write is scripted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import speech_toys as toys
from speech_toys import ENGLISH, GERMAN, NO_TIMES, START, TIMES, TRANSCRIBE, TRANSLATE, Scripted, transcriber

from roundexport.errors import ArtifactError, UsageError
from roundexport.runtime.speech.results import Segment, SpeechSettings
from roundexport.runtime.speech.wav import Sound

WORDS = [40, 41, 42]


def sound(seconds: float, rate: int = 16_000) -> Sound:
    return Sound(np.random.default_rng(0).normal(0, 0.1, round(seconds * rate)).astype(np.float32), rate)


def test_a_short_sound_is_heard_once_in_the_language_that_is_heard(tmp_path: Path) -> None:
    backend = Scripted([WORDS])
    opened = transcriber(tmp_path, backend)
    found = opened.transcribe(sound(2.5, 8000))
    assert backend.prompts == [[START], [START, GERMAN, TRANSCRIBE, NO_TIMES]]
    assert [window.shape for window in backend.windows] == [(1, 80, 3000)]
    assert found.language == "de" and found.seconds == 2.5 and found.text == opened.tokenizer.decode(WORDS).strip()
    (piece,) = found.segments
    assert (piece.start, piece.end, piece.tokens) == (0.0, 2.5, tuple(WORDS))
    assert -1e-6 < piece.avg_logprob <= 0 and piece.no_speech_prob < 0.01


@pytest.mark.parametrize(
    ("settings", "prompt"),
    [
        (SpeechSettings("en"), [START, ENGLISH, TRANSCRIBE, NO_TIMES]),
        (SpeechSettings("<|DE|>", "translate"), [START, GERMAN, TRANSLATE, NO_TIMES]),
        (SpeechSettings("en", timestamps=True), [START, ENGLISH, TRANSCRIBE]),
    ],
)
def test_what_is_asked_for_stands_in_the_prompt(tmp_path: Path, settings: SpeechSettings, prompt: list[int]) -> None:
    backend = Scripted([[TIMES, *WORDS, TIMES + 50] if settings.timestamps else WORDS])
    transcriber(tmp_path, backend).transcribe(sound(1), settings)
    assert backend.prompts == [prompt]


def test_a_long_sound_goes_on_where_the_last_whole_piece_ended(tmp_path: Path) -> None:
    script = [
        [TIMES, 40, TIMES + 1000, TIMES + 1000, 41],  # 20 s whole, then words that are cut off
        [TIMES, 41, TIMES + 900, TIMES + 950, 42, TIMES + 1400],  # from 20 s on, nothing is left open
        [TIMES, 43, TIMES + 100],  # from 50 s on
    ]
    backend, told = Scripted(script), list[Segment]()
    found = transcriber(tmp_path, backend).transcribe(sound(55), SpeechSettings("en"), told.append)
    assert [(round(p.start, 6), round(p.end, 6), p.tokens, p.window) for p in found.segments] == [
        (0, 20, (40,), 0), (20, 38, (41,), 20), (39, 48, (42,), 20), (50, 52, (43,), 50),
    ]  # fmt: skip
    assert told == list(found.segments)
    assert backend.prompts == [[START, ENGLISH, TRANSCRIBE]] * 3
    assert not backend.windows[2][0, :, 500:].any(), "the last window is filled up with zeros"
    np.testing.assert_array_equal(backend.windows[1][0, :, :1000], backend.windows[0][0, :, 2000:])


def test_a_window_in_which_nobody_speaks_is_left_out(tmp_path: Path) -> None:
    unlikely = Scripted([WORDS], nobody=20.0, sure=2.0)
    assert transcriber(tmp_path, unlikely).transcribe(sound(1), SpeechSettings("en")).text == ""
    assert transcriber(tmp_path, unlikely).transcribe(sound(1), SpeechSettings("en", no_speech=None)).text
    likely = Scripted([WORDS], nobody=20.0)
    assert transcriber(tmp_path, likely).transcribe(sound(1), SpeechSettings("en")).text


def test_text_that_came_before_stands_in_front_of_the_first_window(tmp_path: Path) -> None:
    backend = Scripted([[TIMES, 40, TIMES + 1400], [TIMES, 41]])
    opened = transcriber(tmp_path, backend)
    opened.transcribe(sound(40), SpeechSettings("en", prompt=" the sea " * 30))
    first, second = backend.prompts
    words = first[1:-3]
    assert first[0] == toys.BEFORE and len(words) == 31 and first[-3:] == second == [START, ENGLISH, TRANSCRIBE]
    assert opened.tokenizer.decode(words).endswith("the sea")


def test_a_transcript_ends_where_the_context_does(tmp_path: Path) -> None:
    found = transcriber(tmp_path, Scripted([[40] * 100])).transcribe(sound(1), SpeechSettings("en"))
    assert len(found.segments[0].tokens) == 64 - 4
    found = transcriber(tmp_path, Scripted([[40] * 100])).transcribe(sound(1), SpeechSettings("en", max_new_tokens=5))
    assert len(found.segments[0].tokens) == 5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (lambda: SpeechSettings("fr"), "'fr'; it knows en, de"),
        (lambda: SpeechSettings(task="sing"), "transcribe or translate"),
        (lambda: SpeechSettings("en", max_new_tokens=0), "at least 1"),
        (lambda: SpeechSettings("en", no_speech=2.0), "probability"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_run(tmp_path: Path, settings, said: str) -> None:  # type: ignore[no-untyped-def]
    backend = Scripted([WORDS])
    opened = transcriber(tmp_path, backend)
    with pytest.raises(UsageError, match=said):
        opened.transcribe(sound(1), settings())
    assert not backend.windows


def test_work_ends_between_two_runs(tmp_path: Path) -> None:
    left = iter([None, None, None])

    def between() -> None:
        next(left)

    with pytest.raises(StopIteration):
        transcriber(tmp_path, Scripted([[40] * 50])).transcribe(sound(1), SpeechSettings("en"), between=between)


@pytest.mark.parametrize("places", [None, 0, 1499])
def test_a_window_that_steps_do_not_divide_is_refused(tmp_path: Path, places: int | None) -> None:
    opened = transcriber(tmp_path, Scripted([WORDS]))
    (tmp_path / "config.json").write_text(json.dumps({"max_source_positions": places}))
    with pytest.raises(ArtifactError, match="max_source_positions"):
        opened.transcribe(sound(1))


def test_an_end_that_nothing_names_is_refused(tmp_path: Path) -> None:
    opened = transcriber(tmp_path, Scripted([WORDS]))
    opened.manifest.tokens["eos"] = ()
    with pytest.raises(ArtifactError, match="ends a transcript"):
        opened.transcribe(sound(1))


def test_openais_minus_one_suppresses_nothing(tmp_path: Path) -> None:
    assert transcriber(tmp_path, Scripted([WORDS]), suppress_tokens=[-1]).tokens.begin.suppress == ()
