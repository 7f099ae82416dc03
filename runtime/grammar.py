r"""Answers that must look like something: a JSON schema, a regular expression, or a context-free grammar.

Before each token, `llguidance` says as one bit per token which ones may come; everything else gets the logit −∞, and
the sampler chooses among the rest.  An answer ends as soon as nothing may follow; where more may follow or not, the
end-of-sequence tokens are among those that may come, and the model decides.

    Grammars   once per package: the vocabulary as a tree of bytes, and the grammars compiled lately
    Mask       once per answer: the state of a parser; copied in a microsecond, for twins

Limits: whatever the library does not know is refused and not ignored (keywords of JSON Schema, look-around in regular
expressions); what a grammar may use up is bounded by the library (size, states, work per token), and an answer whose
grammar needs more is cut short there.  Between the tokens of JSON at most one space, or one line break and its
indentation, may come: a small model that is free to write white space may never stop.

Cost on one core, for the tokens of the sample model and of SmolLM2, by samples/grammar_cost.py:

                                     4,096 tokens               49,152 tokens
    llguidance 1.9.1   JSON schema   1.4 ms, then 18 (139) µs   1.2 ms, then  55 (321) µs
                       regex         1.3 ms, then 52 (260) µs   1.0 ms, then 169 (564) µs
    xgrammar 0.2.8     JSON schema    52 ms, then 28 (183) µs   629 ms, then 212 (506) µs
                       regex          20 ms, then 28 (272) µs   196 ms, then 225 (629) µs

(compiling, then p50 and p99 per token, logits included; tables once: 0.16 and 0.45 s against 2.3 and 2.2 s).  xgrammar
imports torch besides, which this package does without.

Source: https://github.com/guidance-ai/llguidance (docs/json_schema.md, docs/syntax.md).
"""

from __future__ import annotations

import importlib.util
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as RawTokenizer

from roundexport.errors import UnsupportedError, UsageError

from .settings import Grammar
from .types import LENGTH, STOP, Floats

if TYPE_CHECKING:
    from llguidance import LLMatcher

_REMEMBERED = 32  # compiled grammars
_WHITE = r"( |\n[ \t]{0,24})?"
_FORBIDDEN = np.float32(-np.inf)


class Mask:
    """Which tokens may come next in one answer.

    Args:
        matcher: the parser, in its state.
        size: tokens that it knows.
    """

    def __init__(self, matcher: LLMatcher, size: int) -> None:
        self._matcher = matcher
        self._bits: NDArray[np.int32] = np.zeros((size + 31) // 32, np.int32)

    def restrict(self, logits: Floats) -> Floats:
        """Logits [V] in which tokens that may not come are −∞; the given ones are not changed."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        allowed = np.unpackbits(self._bits.view(np.uint8), count=len(logits), bitorder="little").view(np.bool_)
        return np.where(allowed, logits, _FORBIDDEN)

    def accept(self, token: int) -> None:
        """Go on behind a token."""
        self._matcher.consume_token(token)

    @property
    def ended(self) -> str | None:
        """``stop`` once nothing may follow, ``length`` where the grammar became too much work, None in between."""
        if not self._matcher.is_stopped():
            return None
        return LENGTH if self._matcher.is_error() else STOP

    def copy(self) -> Mask:
        """One in the same state."""
        return Mask(self._matcher.deep_copy(), 32 * len(self._bits))


class Grammars:
    """What all answers of a package share; may be used by several threads.

    Args:
        tokenizer: the package's.
        vocab_size: logits per token.
        eos: tokens that end an answer.

    Raises:
        UnsupportedError: llguidance is not installed, or does not read this tokenizer.
    """

    def __init__(self, tokenizer: RawTokenizer, vocab_size: int, eos: Sequence[int]) -> None:
        if importlib.util.find_spec("llguidance") is None:
            raise UnsupportedError(
                "answers in a given form (JSON schema, regex, grammar) need llguidance, which is not installed; "
                "pip install 'roundexport[grammar]'"
            )
        from llguidance import LLTokenizer

        self._size = max(vocab_size, tokenizer.get_vocab_size())
        try:
            self._tokenizer = LLTokenizer(tokenizer.to_str(), n_vocab=self._size, eos_token=list(eos) or None)
        except ValueError as error:
            raise UnsupportedError(f"llguidance does not read this package's tokenizer: {error}") from error
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Grammar, Mask] = OrderedDict()

    def mask(self, grammar: Grammar) -> Mask:
        """A mask at the beginning of an answer.

        Raises:
            UsageError: the schema, expression or grammar makes no sense, or has something that is not supported.
        """
        with self._lock:
            found = self._compiled.get(grammar)
            if found is None:
                found = self._compiled[grammar] = Mask(self._compile(grammar), self._size)
                if len(self._compiled) > _REMEMBERED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return found.copy()

    def forget(self) -> None:
        """Drop the compiled grammars."""
        with self._lock:
            self._compiled.clear()

    def _compile(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        quiet = LLParserLimits(verbose_errors=False)  # a caller's text does not belong into logs
        try:
            if grammar.kind == "json_schema":
                text = LLMatcher.grammar_from_json_schema(grammar.text, overrides={"whitespace_pattern": _WHITE})
            elif grammar.kind == "regex":
                text = LLMatcher.grammar_from_regex(grammar.text)
            else:
                text = LLMatcher.grammar_from_lark(grammar.text)
            matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=quiet)
        except ValueError as error:
            raise _refused(grammar, str(error)) from error
        if matcher.is_error():
            raise _refused(grammar, matcher.get_error())
        return matcher


def _refused(grammar: Grammar, reason: str) -> UsageError:
    name = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "grammar"}[grammar.kind]
    return UsageError(f"this {name} is not one that answers can be held to: {reason.strip()[:500]}")
