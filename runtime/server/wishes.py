"""From a body to `GenerationSettings`: OpenAI's names and defaults, the package's own defaults, the server's limits.

Where a request is silent, its package's generation_config.json speaks: ``temperature``, ``top_p``, ``top_k``, ``min_p``
and ``repetition_penalty`` if it says ``do_sample: true``, temperature 0 if it says ``do_sample: false``.  Where that is
silent too, OpenAI's defaults hold: temperature 1, top_p 1, penalties 0.  Without a seed every request draws anew.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import msgspec

from roundexport.errors import ArtifactError, UsageError
from roundexport.runtime.settings import GenerationSettings, Grammar

from .errors import ApiError, refused
from .requests import ChatBody, Choosing, CompletionBody, ResponseFormat
from .settings import ServerSettings

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_OPENAI = {"temperature": 1.0}
_STOP_LENGTH = 1000  # characters of a stop string


def defaults_of(generation_config: Mapping[str, Any], where: str) -> dict[str, float]:
    """How a package wants to be sampled where a request does not say.

    Args:
        generation_config: that file, as JSON; empty where there is none.
        where: the file, for errors.

    Raises:
        ArtifactError: a value makes no sense.
    """
    found = dict(_OPENAI)
    if generation_config.get("do_sample") is False:
        found["temperature"] = 0.0
    elif generation_config.get("do_sample"):
        found |= {key: generation_config[key] for key in _SAMPLING if generation_config.get(key) is not None}
    try:
        GenerationSettings(**found)  # type: ignore[arg-type]
    except (UsageError, TypeError) as error:
        raise ArtifactError(f"{where}: {error}") from error
    return found


def settings_of(
    body: ChatBody | CompletionBody, defaults: Mapping[str, float], limits: ServerSettings
) -> GenerationSettings:
    """What a request asks of its answers; ``max_new_tokens`` is what it names, or the default for its kind.

    Raises:
        ApiError: a value is out of range or beyond the server's limits.
    """
    chosen = {name: getattr(body, name) for name in (*_SAMPLING, "presence_penalty", "frequency_penalty", "ignore_eos")}
    given = {name: value for name, value in chosen.items() if value is not None}
    fixed = {
        "max_new_tokens": max(1, tokens_of(body, limits)),
        "logit_bias": _bias(body, limits),
        "stop": _stop(body, limits),
        "seed": secrets.randbits(63) if body.seed is None else body.seed % 2**64,
        "logprobs": _logprobs(body),
        "grammar": grammar_of(body.response_format) if isinstance(body, ChatBody) else None,
    }
    try:
        return GenerationSettings(**{**defaults, **given, **fixed})
    except UsageError as error:
        # The text ends with all settings; who sent them knows them.
        raise refused(str(error).partition("; got GenerationSettings")[0]) from None


def tokens_of(body: Choosing, limits: ServerSettings) -> int:
    """Length of the answer that a request names, or the default of its kind.

    Raises:
        ApiError: it is negative, nothing, or more than the server allows.
    """
    chat = isinstance(body, ChatBody)
    named = body.max_completion_tokens if isinstance(body, ChatBody) else None
    named = body.max_tokens if named is None else named
    if named is None:
        return min(limits.default_tokens if chat else 16, limits.max_tokens or 2**31)
    least = 0 if isinstance(body, CompletionBody) and body.echo else 1
    if named < least:
        raise refused(f"max_tokens must be at least {least}, not {named}", "max_tokens")
    if limits.max_tokens is not None and named > limits.max_tokens:
        raise refused(f"max_tokens must be at most {limits.max_tokens} on this server, not {named}", "max_tokens")
    return named


def named_tokens(body: Choosing) -> bool:
    """Whether the request says how long its answer may be."""
    return body.max_tokens is not None or (isinstance(body, ChatBody) and body.max_completion_tokens is not None)


def choices_of(body: Choosing, prompts: int, limits: ServerSettings) -> int:
    """Answers per prompt.

    Raises:
        ApiError: they are more in all than the server allows.
    """
    count = 1 if body.n is None else body.n
    if count * prompts > limits.max_choices:
        raise refused(
            f"{count} answers to {prompts} prompts are more than the {limits.max_choices} that this server writes for "
            "one request",
            "n",
        )
    return count


def grammar_of(asked: ResponseFormat | None) -> Grammar | None:
    """The grammar behind ``response_format``.

    Raises:
        ApiError: a schema is missing.
    """
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return Grammar("json_schema", '{"type": "object"}')
    if asked.json_schema is None or asked.json_schema.schema is None:
        raise refused("response_format json_schema needs json_schema.schema", "response_format.json_schema")
    return Grammar("json_schema", msgspec.json.encode(asked.json_schema.schema).decode())


def _bias(body: Choosing, limits: ServerSettings) -> dict[int, float]:
    given = body.logit_bias or {}
    if len(given) > limits.max_bias:
        raise refused(f"logit_bias may have {limits.max_bias} entries, not {len(given)}", "logit_bias")
    found = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise refused("logit_bias takes token ids as keys", "logit_bias")
        found[int(key)] = value
    return found


def _stop(body: Choosing, limits: ServerSettings) -> tuple[str, ...]:
    given = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(given) > limits.max_stop:
        raise refused(f"there may be {limits.max_stop} stop strings, not {len(given)}", "stop")
    if any(len(text) > _STOP_LENGTH for text in given):
        raise refused(f"a stop string has at most {_STOP_LENGTH} characters", "stop")
    return given


def _logprobs(body: ChatBody | CompletionBody) -> int | None:
    if isinstance(body, CompletionBody):
        wanted = body.logprobs
    elif body.logprobs:
        wanted = body.top_logprobs or 0
    elif body.top_logprobs:
        raise refused("top_logprobs needs logprobs: true", "top_logprobs")
    else:
        return None
    return wanted


def too_long(prompt: int, asked: int, context: int) -> ApiError:
    """The error for a prompt that leaves no room for its answer, in OpenAI's words."""
    return refused(
        f"This model's maximum context length is {context} tokens. However, you requested {prompt + asked} tokens "
        f"({prompt} in the prompt, {asked} in the completion). Please reduce the length of either.",
        "messages",
        "context_length_exceeded",
    )
