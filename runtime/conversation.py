"""One person's chat: a history of messages, each turn read behind what the cache holds of the turns before.

    messages ─▶ chat template ─▶ PromptMemory ─▶ token ids ─▶ Batch, which keeps the row of the last turn

A turn reads its own message and the template's words around it; nothing that was read or written before is read again.

What does not fit into max_context is forgotten by one rule: where the prompt and a quarter of max_context for the
answer (or ``max_new_tokens``, if that is less) exceed it, the oldest questions leave, each with its answer, until the
prompt fills at most half of max_context; the system message and the newest question stay.  Half, since what follows the
gap has to be read again, which should not happen every turn.  `Turn.forgotten` says how many left.

An answer that is stopped stays in the history as far as it came; one without any text leaves with its question.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .batch import Batch, Counts, Drafter
from .chat_template import Message
from .generation import Decoder
from .images import Picture
from .prompt_memory import PromptMemory
from .settings import GenerationSettings

STOPPED = "stopped"


@dataclass(frozen=True)
class Turn:
    """What one question brought.

    Args:
        text: the answer, as far as it came.
        finished: ``eos``, ``stop``, ``length``, or ``stopped`` by whoever asked.
        prompt_tokens: of the whole conversation.
        counts: what was read, reused, written and guessed for this turn.
        forgotten: questions that left the conversation because it no longer fit.
        ttft_ms: from the question to the first token; None without one.
        tokens_per_second: of the further ones; None with less than two.
    """

    text: str
    finished: str
    prompt_tokens: int
    counts: Counts
    forgotten: int
    ttft_ms: float | None
    tokens_per_second: float | None


class Conversation:
    """A chat with a decoder package that has a chat template.

    Args:
        decoder: the opened package; nobody else may use it meanwhile.
        system: how the model is to behave; None leaves that to the template.
        drafter: guesses tokens ahead; the text stays the same.
        variables: further names that the template knows (``enable_thinking``, …).

    Raises:
        UnsupportedError: the package has no chat template.
    """

    def __init__(
        self,
        decoder: Decoder,
        system: str | None = None,
        *,
        drafter: Drafter | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self._decoder = decoder
        self._variables = dict(variables or {})
        self._memory = PromptMemory(decoder.tokenizer)
        self._batch = Batch(decoder.backend, keep=decoder.manifest.max_context, drafter=drafter)
        self.system = system
        self.history: list[Message] = []
        self.turns: list[Turn] = []
        self._render([{"role": "user", "content": "?"}])  # a package without a template is refused now

    @property
    def messages(self) -> list[Message]:
        """The system message, if there is one, and the history."""
        return [*self._system(), *self.history]

    @property
    def counts(self) -> Counts:
        """What all turns together have read, reused and written."""
        return self._batch.counts

    def reset(self) -> None:
        """Forget the history; the system message stays."""
        self.history.clear()

    def close(self) -> None:
        """Give the cache back."""
        self._batch.close()

    def ask(
        self, question: str, settings: GenerationSettings | None = None, pictures: Sequence[Picture] = ()
    ) -> Iterator[str]:
        """Answer a question, piece by piece.

        Closing the iterator stops the answer.  Then, and at its end, `turns` has one more.

        Args:
            question: the user's message.
            settings: choice of tokens and end.
            pictures: what the question is about, of a package that reads pictures.

        Raises:
            UnsupportedError: pictures are given, and the package reads text.
            UsageError: the template refuses the message, or it does not fit into max_context even alone.
        """
        settings = settings or GenerationSettings()
        began, before = time.perf_counter_ns(), replace(self.counts)
        prompt, ids, history, forgotten = self._prompt(question, settings.max_new_tokens, pictures)
        answer = self._decoder.answer(ids, settings)
        self.history[:] = history
        shown, times, finished = "", list[int](), STOPPED
        self._batch.admit(answer)
        try:
            while answer.finished is None:
                for _, piece in self._batch.advance():
                    times.append(piece.t_ns)
                    shown += piece.text
                    if piece.finished is not None:
                        finished = piece.finished
                    if piece.text:
                        yield piece.text
        finally:
            if answer.finished is None:
                self._batch.remove(answer)
            self._memory.answered(prompt, answer, shown)
            self.history += [{"role": "assistant", "content": shown}] if shown else []
            if not shown:
                self.history.pop()
            spent = (times[-1] - times[0]) / 1e9 if len(times) > 1 else 0.0
            self.turns.append(
                Turn(
                    text=shown,
                    finished=finished,
                    prompt_tokens=len(ids),
                    counts=self.counts - before,
                    forgotten=forgotten,
                    ttft_ms=(times[0] - began) / 1e6 if times else None,
                    tokens_per_second=(len(times) - 1) / spent if spent else None,
                )
            )

    def _prompt(
        self, question: str, wanted: int, pictures: Sequence[Picture]
    ) -> tuple[str, list[int], list[Message], int]:
        """The rendered prompt, its ids, the history that it renders, and how many questions left."""
        most = self._decoder.manifest.max_context
        seen = self._decoder.see(pictures)
        content = [*seen, {"type": "text", "text": question}] if seen else question
        history = [*self.history, {"role": "user", "content": content}]
        text, ids = self._render([*self._system(), *history])
        forgotten = 0
        if len(ids) + min(wanted, most // 4) > most:
            while len(ids) > most // 2 and (rest := _without_oldest(history)):
                history, forgotten = rest, forgotten + 1
                text, ids = self._render([*self._system(), *history])
        return text, ids, history, forgotten

    def _render(self, messages: list[Message]) -> tuple[str, list[int]]:
        text = self._decoder.chat_text(messages, **self._variables)
        return text, self._decoder.chat_ids(messages, text, self._memory)

    def _system(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]


def _without_oldest(history: list[Message]) -> list[Message]:
    """The history from its second question on; empty where there is only one."""
    second = next((i for i, message in enumerate(history) if i > 0 and message["role"] == "user"), len(history))
    return history[second:]
