"""What is asked of a transcript, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass

from roundexport.errors import UsageError

TASKS = ("transcribe", "translate")


@dataclass(frozen=True)
class SpeechSettings:
    """How speech becomes text.

    Args:
        language: code of what is spoken, such as ``en``; None: the model's default, or else it is heard.
        task: ``transcribe``, or ``translate`` into English.
        timestamps: write times too.  Sound longer than the model hears at a time is written with times in any case,
            because they say where the next window begins.
        prompt: text that came before, or names and spellings to keep; None: none.
        max_new_tokens: tokens of one window at most; None: what the model can hold.
        no_speech: a window is silence where the model gives nobody's speaking at least this probability and finds its
            own words unlikely; None: every window is written.
        min_logprob: mean log-probability of a window's tokens below which they count as unlikely.

    Raises:
        UsageError: a value makes no sense.
    """

    language: str | None = None
    task: str = "transcribe"
    timestamps: bool = False
    prompt: str | None = None
    max_new_tokens: int | None = None
    no_speech: float | None = 0.6
    min_logprob: float = -1.0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UsageError(f"task must be {' or '.join(TASKS)}, not {self.task!r}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.no_speech is not None and not 0 <= self.no_speech <= 1:
            raise UsageError(f"no_speech is a probability, not {self.no_speech}")
        object.__setattr__(self, "language", self.language.strip("<|> ").lower() if self.language else None)


@dataclass(frozen=True)
class Segment:
    """A piece of speech.

    Args:
        start: second at which it begins.
        end: second at which it ends.
        text: its words, with the blank before them.
        tokens: its tokens.
        window: second at which its window begins.
        avg_logprob: mean log-probability of the tokens of its window.
        no_speech_prob: probability that nobody speaks in its window.
    """

    start: float
    end: float
    text: str
    tokens: tuple[int, ...]
    window: float
    avg_logprob: float
    no_speech_prob: float


@dataclass(frozen=True)
class Transcript:
    """The words in a sound.

    Args:
        text: all of them.
        language: code of what is spoken, said or heard.
        seconds: length of the sound.
        segments: its pieces, in order.
    """

    text: str
    language: str
    seconds: float
    segments: tuple[Segment, ...]
