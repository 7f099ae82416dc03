"""Whisper's rules and pieces beside transformers' own, over random logits and transcripts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    WhisperTimeStampLogitsProcessor,
)
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from roundexport.errors import ArtifactError, UnsupportedError, UsageError
from roundexport.runtime.speech.results import Segment
from roundexport.runtime.speech.rules import Rules
from roundexport.runtime.speech.segments import Piece, pieces_of
from roundexport.runtime.speech.subtitles import srt, vtt
from roundexport.runtime.speech.tokens import read_tokens
from roundexport.runtime.start_tokens import StartTokens

END, START, TIMES, VOCABULARY = 50, 51, 60, 91
GENERATION = {
    "no_timestamps_token_id": TIMES - 1,
    "prev_sot_token_id": 57,
    "lang_to_id": {"<|en|>": 52, "<|de|>": 53},
    "task_to_id": {"translate": 54, "transcribe": 55},
    "max_initial_timestamp_index": 10,
}


def tokens_of(**changes: object):  # type: ignore[no-untyped-def]
    begin = StartTokens(START, suppress=(1, 2, 57), begin_suppress=(5, END))
    return read_tokens({**GENERATION, **changes}, {}, begin, VOCABULARY, "here")


@pytest.mark.parametrize("timestamps", [False, True])
def test_the_same_tokens_may_come_as_in_transformers(timestamps: bool) -> None:
    draw = np.random.default_rng(0)
    config = GenerationConfig(no_timestamps_token_id=TIMES - 1, eos_token_id=END, max_initial_timestamp_index=10)
    theirs = [
        SuppressTokensAtBeginLogitsProcessor([5, END], begin_index=1),
        SuppressTokensLogitsProcessor([1, 2, 57]),
    ]
    if timestamps:
        theirs.append(WhisperTimeStampLogitsProcessor(config, begin_index=1))
    ours = Rules(tokens_of(), END, timestamps)
    for _ in range(40):
        written: list[int] = []
        for _ in range(12):
            logits = draw.normal(0, 3, VOCABULARY).astype(np.float32)
            wanted = torch.from_numpy(logits)[None]
            for rule in theirs:
                wanted = rule(torch.tensor([[START, *written]]), wanted)
            found = ours.scores(written, logits)
            np.testing.assert_array_equal(found, wanted[0].numpy(), err_msg=str(written))
            written.append(int(found.argmax()))
            if written[-1] == END:
                break


@pytest.mark.parametrize(
    "written",
    [
        [60, 7, 8, 70, 70, 9, 85],
        [60, 7, 8, 70, 70, 9, 4],
        [60, 7, 8, 70],
        [60, 7, 8],
        [60, 7, 70, 71, 8, 80, 80],
        [60, 7, 70, 70, 8, 80, 80, 3],
        [60],
        [],
    ],
)
def test_pieces_are_those_of_transformers(written: list[int]) -> None:
    steps, precision = 32, 0.25  # exact in binary
    theirs, forward = WhisperGenerationMixin._retrieve_segment(
        seek_sequence=torch.tensor(written, dtype=torch.long), seek_outputs=[None],
        time_offset=torch.zeros(1, dtype=torch.float64),
        timestamp_begin=TIMES, seek_num_frames=torch.tensor([2 * steps]), time_precision=precision,
        time_precision_features=precision / 2, input_stride=2, prev_idx=0, idx=0, return_token_timestamps=False,
        decoder_input_ids=torch.zeros(1, 1),
    )  # fmt: skip
    found, moved = pieces_of(written, TIMES, steps)
    assert moved * 2 == int(forward)
    wanted = [
        Piece(round(float(one["start"]) / precision), round(float(one["end"]) / precision),
              tuple(token for token in one["tokens"].tolist() if token < TIMES))
        for one in theirs
    ]  # fmt: skip
    assert [(p.start, p.end) for p in found] == [(p.start, p.end) for p in wanted]
    assert [token for p in found for token in p.tokens] == [
        token for p in wanted for token in p.tokens if p is not wanted[-1] or token in found[-1].tokens
    ]


def test_the_window_always_moves_on() -> None:
    assert pieces_of([60, 60], TIMES, 30)[1] == 1


def test_prompts_hold_language_and_task() -> None:
    tokens = tokens_of()
    assert tokens.prompt("de", "translate", True) == [START, 53, 54]
    assert tokens.prompt("en", "transcribe", False) == [START, 52, 55, TIMES - 1]
    with pytest.raises(UsageError, match="'fr'; it knows en, de"):
        tokens.prompt("fr", "transcribe", False)
    english = tokens_of(lang_to_id=None, task_to_id=None)
    assert english.prompt("en", "transcribe", False) == [START, TIMES - 1]
    for language, task in (("de", "transcribe"), ("en", "translate")):
        with pytest.raises(UsageError, match="only writes down English"):
            english.prompt(language, task, False)


def test_the_checkpoints_own_language_is_the_default() -> None:
    assert tokens_of().language is None
    assert tokens_of(language="<|de|>").language == tokens_of(forced_decoder_ids=[[1, 53], [2, 55]]).language == "de"
    assert tokens_of(forced_decoder_ids=[[1, None], [2, 55]]).language is None


@pytest.mark.parametrize(
    "changes",
    [
        {"prev_sot_token_id": VOCABULARY},
        {"prev_sot_token_id": "51"},
        {"lang_to_id": [52]},
        {"lang_to_id": {"<|en|>": True}},
        {"max_initial_timestamp_index": -1},
    ],
)
def test_files_that_make_no_sense_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ArtifactError, match="here"):
        tokens_of(**changes)


def test_files_from_before_the_times_had_names_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="newest revision"):
        tokens_of(no_timestamps_token_id=None)


def test_subtitles() -> None:
    pieces = [Segment(0.0, 4.2, " A --> b.", (), 0.0, 0.0, 0.0), Segment(3661.5, 3662.0, " End.", (), 0.0, 0.0, 0.0)]
    assert srt(pieces) == ("1\n00:00:00,000 --> 00:00:04,200\nA -> b.\n\n2\n01:01:01,500 --> 01:01:02,000\nEnd.\n")
    assert vtt(pieces) == ("WEBVTT\n\n00:00:00.000 --> 00:00:04.200\nA -> b.\n\n01:01:01.500 --> 01:01:02.000\nEnd.\n")
