"""Token ids of prompts that go on where an earlier prompt and its answer ended.

A chat template writes the whole conversation anew every turn.  To tokenize that anew would do more than waste time: the
model's own answer may come out as other tokens than the model wrote (``"Hel", "lo"`` becomes ``"Hello"``), and then
neither the cache nor what the model saw holds any more.  So, where a text begins with one that is remembered,

    ids(text) = ids(remembered) + encode(rest)

The rest is tokenized by itself, which is exact where it begins with an added token (``<|im_end|>``), as it does in the
chat formats in use; elsewhere the joint is decoded and must give the text again, and otherwise everything is tokenized
anew.  What is remembered of an answer goes as far as its tokens have exactly the text that was shown: not beyond a stop
string, half a character, or an end-of-sequence token, which the template writes itself.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from .answer import Answer
from .tokenizer import Tokenizer

_JOINT = 8  # tokens before the joint that are decoded with it
_BEYOND = 64  # tokens of an answer that may not have been shown


class PromptMemory:
    """Remembers prompts with their answers; may be used by several threads.

    Args:
        tokenizer: the package's.
        size: texts to remember, the ones used last.
    """

    def __init__(self, tokenizer: Tokenizer, size: int = 64) -> None:
        self._tokenizer = tokenizer
        self._size = size
        self._added = tuple(token.content for token in tokenizer.raw.get_added_tokens_decoder().values())
        self._known: OrderedDict[str, list[int]] = OrderedDict()
        self._lock = threading.Lock()

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered prompt, those of the longest remembered beginning as they were."""
        with self._lock:
            known = max((old for old in self._known if text.startswith(old)), key=len, default=None)
            if known is not None:
                self._known.move_to_end(known)
                ids = self._known[known]
        if known is not None:
            rest = text[len(known) :]
            new = self._tokenizer.encode(rest, add_special_tokens=False) if rest else []
            if not rest or rest.startswith(self._added) or self._joins(ids, new, rest):
                return ids + new
        return self._tokenizer.encode(text, add_special_tokens=False)

    def remember(self, text: str, ids: Sequence[int]) -> None:
        """Keep the token ids of a text."""
        with self._lock:
            self._known[text] = list(ids)
            self._known.move_to_end(text)
            if len(self._known) > self._size:
                self._known.popitem(last=False)

    def answered(self, prompt: str, answer: Answer, shown: str) -> None:
        """Keep a prompt with its answer, as far as the answer's tokens have the text that was shown.

        Nothing is kept where that ends more than 64 tokens before the answer does.

        Args:
            prompt: the rendered prompt.
            answer: finished or not.
            shown: its text.
        """
        new = answer.new_tokens
        if new and new[-1] in answer.eos:
            new.pop()
        for _ in range(_BEYOND):
            text = self._tokenizer.decode(new)
            if shown.startswith(text):
                self.remember(prompt + text, [*answer.tokens[: answer.prompt_len], *new])
                return
            new.pop()

    def _joins(self, old: Sequence[int], new: Sequence[int], rest: str) -> bool:
        """Whether new tokens behind the old ones have the text of the rest."""
        decode = self._tokenizer.raw.decode
        before = list(old[-_JOINT:])
        return decode([*before, *new], skip_special_tokens=False) == decode(before, skip_special_tokens=False) + rest
