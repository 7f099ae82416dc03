"""Words out of speech: log-mel features, windows of 30 seconds, and a decoder that writes what it hears.

    sound ─16 kHz─▶ features [80, T] ─window─▶ encoder ─▶ prompt, then greedily token by token ─▶ pieces with times

A sound that fits into one window is heard once.  A longer one is written with times: a window's last whole piece ends
at a time, and the next window begins there (speech/segments.py), so that no word is cut.  The last window is filled up
with zeros and a short sound with silence, as transformers does.

Windows in which nobody speaks make Whisper invent words; OpenAI's rule leaves out a window where the token for
"nobody speaks" has a probability of 0.6 and the words found are unlikely (mean log-probability below −1).  OpenAI's
second attempts at a higher temperature, beams, and a prompt made of the window before are not done here.

Source: https://arxiv.org/abs/2212.04356, section 4.5; transcribe.py of https://github.com/openai/whisper (MIT).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from roundexport.errors import ArtifactError, UsageError
from roundexport.storage.paths import ListedFiles

from .seq2seq_package import Seq2SeqPackage
from .speech.features import LogMel, read_features
from .speech.resampling import resample
from .speech.results import Segment, SpeechSettings, Transcript
from .speech.rules import Rules
from .speech.segments import Piece, pieces_of
from .speech.tokens import SpeechTokens, read_tokens
from .speech.wav import Sound, read_wav
from .tokenizer import read_json
from .types import Floats

OnSegment = Callable[[Segment], None]
Between = Callable[[], None]
_DEFAULT = SpeechSettings()


@dataclass(frozen=True)
class _Window:
    """What the model wrote for one window."""

    tokens: list[int]
    avg_logprob: float
    no_speech_prob: float


class Transcriber(Seq2SeqPackage):
    """A speech package ready to write down what is said."""

    @cached_property
    def features(self) -> LogMel:
        """What the model hears of a sound.

        Raises:
            ArtifactError: the package's files make no sense.
            UnsupportedError: the package's features are computed otherwise.
        """
        return read_features(self._folder, self.manifest.files)

    @cached_property
    def tokens(self) -> SpeechTokens:
        """The model's special tokens.

        Raises:
            ArtifactError: the package's files make no sense.
            UnsupportedError: files of before 2023.
        """
        generation, config = self._read("generation_config.json"), self._read("config.json")
        return read_tokens(generation, config, self.start_tokens, self.manifest.vocab_size, str(self._folder))

    @cached_property
    def _stride(self) -> int:
        """Frames of a step."""
        places, window = self._read("config.json").get("max_source_positions"), self.features.window
        if not isinstance(places, int) or places < 1 or window % places:
            raise ArtifactError(f"{self._folder}: config.json says max_source_positions {places!r}, which does not "
                                f"divide the {window} frames of a window")  # fmt: skip
        return window // places

    def _read(self, name: str) -> dict[str, Any]:
        return read_json(ListedFiles(self._folder, self.manifest.files).find(name))

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes of the languages that the model knows."""
        return tuple(self.tokens.languages) or ("en",)

    def transcribe(
        self,
        sound: str | Path | bytes | Sound,
        settings: SpeechSettings = _DEFAULT,
        on_segment: OnSegment | None = None,
        between: Between | None = None,
    ) -> Transcript:
        """Write down what is said.

        Args:
            sound: a WAV file by path or as bytes, or samples with their rate.
            settings: language, task, times.
            on_segment: told of every piece as soon as it is written.
            between: called before every run of the model; what it raises ends the work.

        Returns:
            Words and pieces; no words where nobody speaks.

        Raises:
            UsageError: the sound cannot be read, or the model does not know the language or task.
            ArtifactError: a side file of the package makes no sense, or no token ends a transcript.
        """
        if not self.manifest.tokens["eos"]:
            raise ArtifactError(f"{self._folder}: the package names no token that ends a transcript")
        self.tokens.prompt(settings.language or self.languages[0], settings.task, False)  # refuses before any work
        before = self._before(settings.prompt)
        heard = sound if isinstance(sound, Sound) else read_wav(sound)
        samples, window = resample(heard, self.features.sampling_rate), self.features.window
        total = -(-len(samples) // self.features.hop_length)
        features = self.features.window_of(samples) if total <= window else self.features.of(samples)
        encoded = self._encode(features, between)
        language = settings.language or self.tokens.language or self._language(encoded)
        stamped = settings.timestamps or total > window
        rules = Rules(self.tokens, min(self.manifest.tokens["eos"]), stamped)
        prompt = self.tokens.prompt(language, settings.task, stamped)
        found: list[Segment] = []
        place = 0
        while place == 0 or total - place >= self._stride:
            if place:
                encoded = self._encode(features[:, place:], between)
            steps = max(1, min(window, total - place) // self._stride)
            front = prompt if place else before + prompt
            written = self._write(encoded, front, rules, settings.max_new_tokens, between)
            pieces, forward = self._pieces(written, stamped, steps, settings)
            for piece in pieces:
                found.append(self._segment(piece, place, written))
                if on_segment is not None:
                    on_segment(found[-1])
            place += forward * self._stride
        return Transcript("".join(one.text for one in found).strip(), language, heard.seconds, tuple(found))

    def _encode(self, features: Floats, between: Between | None) -> Any:
        """The first window of features [bands, T], filled up with zeros where it is shorter."""
        if between is not None:
            between()
        window = features[:, : self.features.window]
        rest = self.features.window - window.shape[1]
        return self.backend.encode({"input_features": np.pad(window, ((0, 0), (0, rest)))[None]})

    def _language(self, encoded: Any) -> str:
        """The language that the model hears."""
        with self.backend.start(encoded) as session:
            logits = session.step(np.array([[self.tokens.start]], np.int64))[0, -1]
        return max(self.tokens.languages, key=lambda code: float(logits[self.tokens.languages[code]]))

    def _before(self, text: str | None) -> list[int]:
        """What is put in front of the prompt for text that came before; as much as half of the model's context."""
        if text is None or not text.strip():
            return []
        if self.tokens.previous is None:
            raise UsageError("the model takes no text that came before; leave the prompt out")
        ids = self.tokenizer.encode(f" {text.strip()}", add_special_tokens=False)
        if any(token >= min(self.tokens.start, *self.manifest.tokens["eos"]) for token in ids):
            raise UsageError("the text that came before holds special tokens, as <|…|>; give words alone")
        return [self.tokens.previous, *ids[1 - self.manifest.max_context // 2 :]]

    def _write(
        self, encoded: Any, prompt: list[int], rules: Rules, most: int | None, between: Between | None
    ) -> _Window:
        """The likeliest tokens, one after another, until the transcript ends or the context is full."""
        ends, room = self.manifest.tokens["eos"], self.manifest.max_context - len(prompt)
        room = min(room, most or room)
        written: list[int] = []
        total = 0.0
        with self.backend.start(encoded) as session:
            logits = session.step(np.array([prompt], np.int64))[0]
            silence = _log_probability(logits[prompt.index(self.tokens.start)], self.tokens.no_speech)
            while True:
                scores = rules.scores(written, logits[-1])
                token = int(scores.argmax())
                total += _log_probability(scores, token)
                if token in ends:
                    break
                written.append(token)
                if len(written) >= room:
                    break
                if between is not None:
                    between()
                logits = session.step(np.array([[token]], np.int64))[0]
        return _Window(written, total / (len(written) + 1), float(np.exp(silence)))

    def _pieces(self, written: _Window, stamped: bool, steps: int, settings: SpeechSettings) -> tuple[list[Piece], int]:
        """Pieces of a window, and how many steps the next one begins later."""
        silent = settings.no_speech is not None and written.no_speech_prob > settings.no_speech
        if silent and written.avg_logprob < settings.min_logprob:
            return [], steps
        if stamped:
            return pieces_of(written.tokens, self.tokens.times, steps)
        return [Piece(0, steps, tuple(written.tokens))], steps

    def _segment(self, piece: Piece, place: int, written: _Window) -> Segment:
        """A piece of the window that begins at a frame, with its words."""
        begin, rate = place / self.features.frames_per_second, self._stride / self.features.frames_per_second
        return Segment(
            start=begin + piece.start * rate,
            end=begin + piece.end * rate,
            text=self.tokenizer.decode(piece.tokens),
            tokens=piece.tokens,
            window=begin,
            avg_logprob=written.avg_logprob,
            no_speech_prob=written.no_speech_prob,
        )


def _log_probability(logits: Floats, token: int) -> float:
    best = logits.max()
    return float(logits[token] - best - np.log(np.exp(logits - best).sum()))
