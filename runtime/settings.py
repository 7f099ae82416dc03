"""What a caller may ask of an answer: how tokens are chosen, what is told about them, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from roundexport.errors import UsageError

GrammarKind = Literal["json_schema", "regex", "lark"]
MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like.

    Args:
        kind: ``json_schema``, ``regex``, or ``lark`` (a context-free grammar in llguidance's notation).
        text: the schema as JSON, the expression, or the grammar.
    """

    kind: GrammarKind
    text: str


@dataclass(frozen=True)
class GenerationSettings:
    """How tokens are chosen and when to stop.

    Args:
        max_new_tokens: most tokens per row; the package's ``max_context`` may end a row sooner.
        temperature: 0 takes the likeliest token; above 0 samples from softmax(logits / temperature).
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probability reaches top_p; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        repetition_penalty: logits of tokens seen in the row are divided (positive) or multiplied (negative) by it.
        presence_penalty: subtracted from the logit of every token that the answer has.
        frequency_penalty: subtracted from a token's logit as often as the answer has it.
        logit_bias: added to the logits of these token ids; ±100 decides.
        seed: fixes sampled tokens; a row's tokens depend on its number in the batch, not on its neighbors.
        stop: strings that end a row; the text stops before them.
        ignore_eos: go on after end-of-sequence tokens.
        logprobs: likeliest alternatives to tell with each token, with log-probabilities; None tells none, not even
            the chosen token's.
        grammar: what the answer must look like; None leaves it free.
        show: special tokens whose text is shown, which otherwise have none; the marks of tool calls.

    Raises:
        UsageError: a value is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    grammar: Grammar | None = None
    show: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, "max_new_tokens must be at least 1"),
            (0 <= self.temperature < math.inf, "temperature must be finite and not negative"),
            (self.top_k >= 0, "top_k must not be negative (0 keeps all)"),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (0 <= self.min_p <= 1, "min_p must be between 0 and 1"),
            (
                0 < self.repetition_penalty < math.inf,
                "repetition_penalty must be positive and finite (1 changes nothing)",
            ),
            (-math.inf < self.presence_penalty < math.inf, "presence_penalty must be finite (0 changes nothing)"),
            (-math.inf < self.frequency_penalty < math.inf, "frequency_penalty must be finite (0 changes nothing)"),
            (
                all(token >= 0 and math.isfinite(bias) for token, bias in self.logit_bias.items()),
                "logit_bias takes token ids and finite numbers",
            ),
            (0 <= self.seed < 2**64, "seed must be from 0 to 2**64 - 1"),
            (not isinstance(self.stop, str) and all(self.stop), "stop is a tuple of strings, none of them empty"),
            (
                self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS,
                f"logprobs must be from 0 to {MOST_LOGPROBS}",
            ),
        )
        wrong = [text for held, text in checks if not held]
        if wrong:
            raise UsageError(f"generation settings: {'; '.join(wrong)}; got {self}")
