"""``/v1/chat/completions``: messages through the package's chat template, answers whole or as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from roundexport.errors import UnsupportedError
from roundexport.runtime.answer import Piece
from roundexport.runtime.sampling import Choice

from .answers import Answers, check_bytes, check_room, told
from .errors import refused
from .models import DecoderModel
from .requests import ChatBody, Message, decode
from .service import Service, as_json, count, new_id, now, service_of, stream, usage, watched
from .settings import ServerSettings
from .sse import DONE, WAITING, event, while_connected
from .token_texts import TokenTexts
from .wishes import choices_of, named_tokens, settings_of

_RESERVED = ("messages", "tools", "add_generation_prompt", "documents")  # names that are not the caller's to set


async def chat(request: Request) -> Response:
    """Answer a chat."""
    service = service_of(request)
    body = decode(await request.body(), ChatBody)
    model = service.models.decoder(body.model)
    seen = service.metrics.begin("chat", model.name)
    async with watched(seen):
        check(body, service.settings)
        answers = await while_connected(request.receive, _begin(service, model, body, seen.first))
        told_id = {"id": new_id("chatcmpl"), "created": now(), "model": model.name}
        if body.stream:
            return stream(answers, seen, _events(answers, body, told_id), service.settings)
        try:
            await while_connected(request.receive, _finish(answers))
        finally:
            answers.cancel()
        count(answers, seen)
        choices = [_choice(answers, index) for index in range(len(answers.written))]
        return as_json({**told_id, "object": "chat.completion", "choices": choices, "usage": usage(answers)})


async def _begin(service: Service, model: DecoderModel, body: ChatBody, on_first: Any) -> Answers:
    settings = settings_of(body, model.defaults, service.settings)
    number, deadline = choices_of(body, 1, service.settings), service.deadline()
    ids = await asyncio.to_thread(encode, model, body)
    check_room([ids], settings.max_new_tokens, named_tokens(body), model.max_context)
    answers = Answers(model, [ids], number, settings, deadline, on_first)
    await answers.submit()
    return answers


async def _finish(answers: Answers) -> None:
    async for _ in answers.pieces():
        pass


def check(body: ChatBody, limits: ServerSettings) -> None:
    """Refuse chats beyond the limits, and what is not here.

    Raises:
        ApiError: says which.
    """
    if not body.messages:
        raise refused("messages must not be empty", "messages")
    if len(body.messages) > limits.max_messages:
        raise refused(f"a chat may have {limits.max_messages} messages, not {len(body.messages)}", "messages")
    if body.tools and body.tool_choice != "none":
        raise refused("this server does not parse calls of tools yet; leave tools out", "tools", "unsupported")
    if body.response_format is not None and body.response_format.type != "text":
        raise refused("this server does not constrain answers yet; leave response_format out", "response_format")


def encode(model: DecoderModel, body: ChatBody) -> list[int]:
    """Token ids of a chat; for a worker thread, since a template is a program and a text may be long.

    Raises:
        ApiError: it cannot fit, a part is not text, or the package has no chat template.
    """
    messages = [as_message(message, number) for number, message in enumerate(body.messages)]
    context, longest = model.max_context, model.longest
    check_bytes(sum(len(message["content"] or "") for message in messages), longest, context)
    variables = dict(body.chat_template_kwargs or {})
    if wrong := [name for name in _RESERVED if name in variables]:
        raise refused(f"chat_template_kwargs cannot set {wrong[0]}", "chat_template_kwargs")
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
    try:
        prompt = model.tokenizer.chat_prompt(messages, **variables)
    except UnsupportedError as error:
        raise refused(f"the model {model.name!r} has no chat template; use /v1/completions", "model") from error
    check_bytes(len(prompt), longest, context)
    return model.tokenizer.encode(prompt, add_special_tokens=False)


def as_message(message: Message, number: int) -> dict[str, Any]:
    """A message as chat templates know it: text as one string, arguments of calls as objects.

    Raises:
        ApiError: a part of it is not text.
    """
    where = f"messages[{number}].content"
    content = message.content
    if isinstance(content, list):
        if wrong := [part.type for part in content if part.type != "text" or part.text is None]:
            raise refused(f"{where}: this model reads text, not {wrong[0][:50]!r}", where)
        content = "".join(part.text or "" for part in content)
    if content is None and not message.tool_calls:
        raise refused(f"{where} must be a text", where)
    found: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content or "",
    }
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments, number)},
            }
            for call in message.tool_calls
        ]
    return found


def _arguments(text: str, number: int) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, ValueError):
        where = f"messages[{number}].tool_calls"
        raise refused(f"{where}: the arguments of a call are not JSON", where) from None


def _choice(answers: Answers, index: int) -> dict[str, Any]:
    written = answers.written[index]
    return {
        "index": index,
        "message": {"role": "assistant", "content": "".join(written.text), "refusal": None},
        "logprobs": _logprobs(answers.model.texts, written.choices) if answers.settings.logprobs is not None else None,
        "finish_reason": written.finished,
    }


async def _events(answers: Answers, body: ChatBody, told_id: dict[str, Any]) -> AsyncIterator[bytes]:
    """Chunks as pieces come; the first one of an answer names its role, the last one says why it ended."""
    head = {**told_id, "object": "chat.completion.chunk"}
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    rest: dict[str, Any] = {"usage": None} if with_usage else {}
    begun: set[int] = set()
    async for pieces in answers.pieces(waiting=True):
        data = [] if pieces else [WAITING]
        for index, piece in pieces:
            delta: dict[str, Any] = {} if index in begun else {"role": "assistant", "content": ""}
            if piece.text:
                delta["content"] = piece.text
            if delta or told(piece):
                begun.add(index)
                choice = {
                    "index": index,
                    "delta": delta,
                    "logprobs": _piece_logprobs(answers.model.texts, piece),
                    "finish_reason": None,
                }
                data.append(event({**head, "choices": [choice], **rest}))
            if piece.finished is not None:
                last = {"index": index, "delta": {}, "logprobs": None, "finish_reason": answers.written[index].finished}
                data.append(event({**head, "choices": [last], **rest}))
        yield b"".join(data)
    if with_usage:
        yield event({**head, "choices": [], "usage": usage(answers)})
    yield DONE


def _piece_logprobs(texts: TokenTexts, piece: Piece) -> dict[str, Any] | None:
    return _logprobs(texts, [piece.choice]) if told(piece) else None


def _logprobs(texts: TokenTexts, choices: list[Choice]) -> dict[str, Any]:
    """Tokens with their log-probabilities and alternatives, in OpenAI's form for chats."""
    content = [
        {**_token(texts, choice.token, choice.logprob), "top_logprobs": [_token(texts, *pair) for pair in choice.top]}
        for choice in choices
    ]
    return {"content": content, "refusal": None}


def _token(texts: TokenTexts, token: int, logprob: float | None) -> dict[str, Any]:
    return {"token": texts.text(token), "logprob": logprob, "bytes": list(texts.bytes(token))}
