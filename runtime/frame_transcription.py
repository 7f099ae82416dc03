"""Words out of speech by one model: samples, one run, the likeliest letter of every frame (speech/ctc.py).

A sound goes through the model by itself, so nothing is padded: models that were trained with an attention mask give
what they give with it, and models that were not hear no silence that is not there.

A sound of more than a minute is read in windows of 30 seconds that overlap by 5 on either side; of each the frames in
the middle count.  Attention takes memory by the square of its length.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from roundexport.errors import ArtifactError, UsageError
from roundexport.storage.paths import ListedFiles

from .encoder_package import EncoderPackage
from .speech.ctc import CtcVocabulary, Spoken, read_vocabulary
from .speech.resampling import resample
from .speech.results import Segment, SpeechSettings, Transcript
from .speech.wav import Sound, read_wav
from .speech.waveform import Waveform, frame_size, frames_of, least_samples, read_waveform
from .tokenizer import read_json
from .transcription import OnSegment
from .types import Floats

_DEFAULT = SpeechSettings()
_WHOLE, _WINDOW, _OVERLAP = 60, 30, 5  # seconds
_UNKNOWN = ""  # language: such a model neither asks nor says


class FrameTranscriber(EncoderPackage):
    """A package with a head for connectionist temporal classification, ready to write down what is said."""

    @cached_property
    def waveform(self) -> Waveform:
        """How samples are prepared.

        Raises:
            ArtifactError, UnsupportedError: the package's files say something that is not done here.
        """
        return read_waveform(self._folder, self.manifest.files)

    @cached_property
    def vocabulary(self) -> CtcVocabulary:
        """What the model's ids stand for.

        Raises:
            ArtifactError, UnsupportedError: the package's files do not say, or say it for several languages.
        """
        return read_vocabulary(self._folder, self.manifest.tokens["pad"], self.manifest.vocab_size, self.manifest.files)

    @cached_property
    def frame_size(self) -> int:
        """Samples from one frame to the next."""
        return frame_size(self._config, self._folder)

    @cached_property
    def _config(self) -> dict[str, Any]:
        return read_json(ListedFiles(self._folder, self.manifest.files).find("config.json"))

    def logits(self, samples: Floats) -> Floats:
        """Logits [frames, V] of a sound.

        Args:
            samples: [T], of the model's rate and unprepared.

        Raises:
            UsageError: it is shorter than one frame.
            ArtifactError: the graph makes another number of frames than config.json says.
        """
        least = least_samples(self._config) if self.frame_size else 0
        if samples.ndim != 1 or len(samples) < least:
            raise UsageError(f"a sound is samples [T], at least {least} of them, not {list(samples.shape)}")
        found: Floats = self.output({"input_values": self.waveform(samples)[None]})[0]
        frames = frames_of(self._config, len(samples))
        if len(found) != frames:
            raise ArtifactError(
                f"{self._folder}: its graph makes {len(found)} frames of {len(samples)} samples, and the convolutions "
                f"of its config.json make {frames}; words would have wrong times"
            )
        return found

    def transcribe(
        self,
        sound: str | Path | bytes | Sound,
        settings: SpeechSettings = _DEFAULT,
        on_segment: OnSegment | None = None,
    ) -> Transcript:
        """Write down what is said.

        Args:
            sound: a WAV file by path or as bytes, or samples with their rate.
            settings: nothing in it changes what such a model writes.
            on_segment: told of every word.

        Returns:
            Words with their times; a word is a segment.

        Raises:
            UsageError: the sound cannot be read or is too short, or a language, a translation or text before is asked
                for, of which such a model knows nothing.
        """
        if settings.language or settings.prompt or settings.task != "transcribe":
            raise UsageError("this model writes what it hears; it takes no language, no task and no text before")
        heard = sound if isinstance(sound, Sound) else read_wav(sound)
        ids: list[int] = []
        sure: list[float] = []
        for logits in self._windows(resample(heard, self.waveform.sampling_rate)):
            ids += logits.argmax(-1).tolist()
            best = logits.max(-1)
            sure += (-np.log(np.exp(logits - best[:, None]).sum(-1))).tolist()
        found = [self._segment(word, sure) for word in self.vocabulary.words(ids)]
        for segment in found:
            if on_segment is not None:
                on_segment(segment)
        text = "".join(segment.text for segment in found).strip()
        return Transcript(text, _UNKNOWN, heard.seconds, tuple(found))

    def _windows(self, samples: Floats) -> Iterator[Floats]:
        """Logits of a sound, in order; of windows that overlap each frame once."""
        rate, size = self.waveform.sampling_rate, self.frame_size
        if len(samples) <= _WHOLE * rate:
            yield self.logits(samples)
            return
        window, overlap = (seconds * rate // size for seconds in (_WINDOW, _OVERLAP))
        step, total = window - 2 * overlap, len(samples) // size
        for start in range(0, total - 2 * overlap, step):
            last = start + step >= total - 2 * overlap
            logits = self.logits(samples[start * size : None if last else (start + window) * size])
            yield logits[overlap if start else 0 : None if last else window - overlap]

    def _segment(self, word: Spoken, sure: list[float]) -> Segment:
        seconds = self.frame_size / self.waveform.sampling_rate
        return Segment(
            start=word.start * seconds,
            end=word.end * seconds,
            text=f" {word.text}",
            tokens=word.tokens,
            window=0.0,
            avg_logprob=float(np.mean(sure[word.start : word.end])),
            no_speech_prob=0.0,
        )
