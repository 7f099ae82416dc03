"""``/v1/completions``: prompts as texts or token ids; answers whole or streamed, with echo and log-probabilities.

``echo`` with ``logprobs`` tells how likely the prompt itself is, which is how benchmarks of multiple choice ask (the
``local-completions`` of lm-evaluation-harness); ``max_tokens: 0`` then asks for nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from roundexport.runtime.sampling import Choice

from .answers import Answers, Caller, check_bytes, check_room, told
from .errors import refused
from .models import DecoderModel
from .requests import CompletionBody, decode, rows
from .service import Service, as_json, count, new_id, now, service_of, stream, usage, watched
from .settings import ServerSettings
from .sse import DONE, WAITING, event, while_connected
from .token_texts import TokenTexts
from .wishes import choices_of, named_tokens, settings_of, tokens_of


async def completions(request: Request) -> Response:
    """Go on from prompts."""
    service = service_of(request)
    body = decode(await request.body(), CompletionBody)
    model = service.models.decoder(body.model)
    seen = service.metrics.begin("text_completion", model.name)
    async with watched(seen):
        check(body, service.settings)
        answers, echoes = await while_connected(
            request.receive, _begin(service, service.caller(request), model, body, seen.first)
        )
        head = {"id": new_id("cmpl"), "object": "text_completion", "created": now(), "model": model.name}
        if body.stream:
            return stream(answers, seen, _events(answers, echoes, body, head))
        try:
            await while_connected(request.receive, answers.finish())
        finally:
            answers.cancel()
        count(answers, seen)
        choices = [_choice(answers, echoes, index) for index in range(len(answers.written))]
        return as_json({**head, "choices": choices, "usage": usage(answers)})


@dataclass(frozen=True)
class Echo:
    """What stands before an answer.

    Args:
        text: the prompt's, if it is to be repeated.
        choices: its tokens with their log-probabilities, if those are to be told; the first one has none.
    """

    text: str
    choices: list[Choice]


async def _begin(
    service: Service, caller: Caller, model: DecoderModel, body: CompletionBody, on_first: Callable[[int], None]
) -> tuple[Answers, list[Echo]]:
    """The answers, on their way, and what stands before each one's text."""
    settings = settings_of(body, model.defaults, service.settings)
    given = rows(body.prompt, "prompt")
    number = choices_of(body, len(given), service.settings)
    answers = Answers(model, number, settings, caller, on_first)
    texts: list[str] = []

    def prompts() -> list[list[int]]:
        ids = [encode(model, prompt) for prompt in given]
        texts.extend(echoed(model, prompt) if body.echo else "" for prompt in given)
        return ids

    scores: list[list[Choice]] = [[] for _ in given]
    if body.echo and body.logprobs is not None:
        ids = await asyncio.to_thread(prompts)
        asked = tokens_of(body, service.settings)
        check_room(ids, asked, named_tokens(body), model.max_context)
        scores = await answers.scored(ids)
        scores = [[Choice(row[0]), *found] for row, found in zip(ids, scores, strict=True)]
        if asked:
            await answers.submit(lambda: ids, named_tokens(body))
        else:
            answers.nothing(ids)
    else:
        await answers.submit(prompts, named_tokens(body))
    echoes = [Echo(text, choices) for text, choices in zip(texts, scores, strict=True)]
    return answers, [echo for echo in echoes for _ in range(number)]


def check(body: CompletionBody, limits: ServerSettings) -> None:
    """Refuse what is not here.

    Raises:
        ApiError: says what.
    """
    if body.suffix:
        raise refused("suffix is not here: this server writes behind a prompt, not between two texts", "suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise refused("best_of must equal n: this server tells all answers that it writes", "best_of")
    if body.stream and body.echo and body.logprobs is not None:
        raise refused("echo with logprobs is not streamed; leave stream out", "stream")
    if tokens_of(body, limits) < 1 and body.logprobs is None:
        raise refused("max_tokens 0 needs logprobs: there would be nothing to tell", "max_tokens")


def encode(model: DecoderModel, prompt: str | list[int]) -> list[int]:
    """Token ids of a prompt.

    Raises:
        ApiError: it cannot fit.
        UsageError: a token is not in the vocabulary.
    """
    if isinstance(prompt, str):
        check_bytes(len(prompt), model.longest, model.max_context)
        return model.tokenizer.encode(prompt)
    if not all(0 <= token < model.decoder.manifest.vocab_size for token in prompt):
        raise refused(f"the prompt has tokens outside 0 … {model.decoder.manifest.vocab_size - 1}", "prompt")
    return prompt


def echoed(model: DecoderModel, prompt: str | list[int]) -> str:
    """A prompt's text."""
    return prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)


def _choice(answers: Answers, echoes: list[Echo], index: int) -> dict[str, Any]:
    written, echo = answers.written[index], echoes[index]
    wanted = answers.settings.logprobs is not None
    return {
        "index": index,
        "text": echo.text + "".join(written.text),
        "logprobs": _logprobs(answers.model.texts, [*echo.choices, *written.choices], 0) if wanted else None,
        "finish_reason": written.finished,
    }


async def _events(
    answers: Answers, echoes: list[Echo], body: CompletionBody, head: dict[str, Any]
) -> AsyncIterator[bytes]:
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    rest: dict[str, Any] = {"usage": None} if with_usage else {}
    offsets = [0] * len(echoes)
    before = [echo.text for echo in echoes]
    async for pieces in answers.pieces(waiting=True):
        data = [] if pieces else [WAITING]
        for index, piece in pieces:
            text, before[index] = before[index] + piece.text, ""
            logprobs = _logprobs(answers.model.texts, [piece.choice], offsets[index]) if told(piece) else None
            if logprobs is not None:
                offsets[index] += len(answers.model.texts.text(piece.choice.token))
            if text or logprobs or piece.finished is not None:
                finished = answers.written[index].finished if piece.finished is not None else None
                choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finished}
                data.append(event({**head, "choices": [choice], **rest}))
        if data:
            yield b"".join(data)
    if with_usage:
        yield event({**head, "choices": [], "usage": usage(answers)})
    yield DONE


def _logprobs(texts: TokenTexts, choices: list[Choice], offset: int) -> dict[str, Any]:
    """Tokens with their log-probabilities and alternatives, in OpenAI's form for completions."""
    places = [offset]
    for choice in choices[:-1]:
        places.append(places[-1] + len(texts.text(choice.token)))
    return {
        "tokens": [texts.key(choice.token) for choice in choices],
        "token_logprobs": [choice.logprob for choice in choices],
        "top_logprobs": [
            None if choice.logprob is None else {texts.key(token): value for token, value in choice.top}
            for choice in choices
        ],
        "text_offset": places[: len(choices)],
    }
