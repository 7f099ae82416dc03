"""``/v1/chat/completions``: messages through the package's chat template, answers whole or as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from roundexport.runtime.answer import Piece
from roundexport.runtime.sampling import Choice
from roundexport.runtime.settings import GenerationSettings
from roundexport.runtime.tool_calls import ToolStream

from .answers import Answers, told
from .errors import refused
from .messages import render
from .models import DecoderModel
from .requests import ChatBody, decode
from .service import Service, as_json, count, new_id, now, service_of, stream, usage, watched
from .settings import ServerSettings
from .sse import DONE, WAITING, event, while_connected
from .token_texts import TokenTexts
from .tools import Tools, tools_of
from .wishes import choices_of, named_tokens, settings_of


async def chat(request: Request) -> Response:
    """Answer a chat."""
    service = service_of(request)
    body = decode(await request.body(), ChatBody)
    model = service.models.decoder(body.model)
    seen = service.metrics.begin("chat", model.name)
    async with watched(seen):
        check(body, service.settings)
        tools = tools_of(body, model, service.settings.max_tools)
        settings = _settings(service, model, body, tools)
        answers = Answers(model, choices_of(body, 1, service.settings), settings, service.caller(request), seen.first)
        prompt = await while_connected(request.receive, _begin(answers, body, tools))
        head = {"id": new_id("chatcmpl"), "created": now(), "model": model.name}
        if body.stream:
            return stream(answers, seen, Chunks(answers, prompt, body, tools, head).events())
        try:
            await while_connected(request.receive, answers.finish())
            await answers.remember(prompt)
        finally:
            answers.cancel()
        count(answers, seen)
        choices = [_choice(answers, index, tools) for index in range(len(answers.written))]
        return as_json({**head, "object": "chat.completion", "choices": choices, "usage": usage(answers)})


def _settings(service: Service, model: DecoderModel, body: ChatBody, tools: Tools | None) -> GenerationSettings:
    """How tokens are chosen, tool calls among them."""
    settings = settings_of(body, model.defaults, service.settings)
    if tools is None:
        return settings
    return replace(settings, show=tools.format.marks, grammar=tools.grammar or settings.grammar)


async def _begin(answers: Answers, body: ChatBody, tools: Tools | None) -> str:
    """Send the answers on their way; returns the prompt as text."""
    model, texts = answers.model, []

    def prompts() -> list[list[int]]:
        messages, text = render(model, body, None if tools is None else tools.told, answers.check_wanted)
        texts.append(text)
        return [model.decoder.chat_ids(messages, text, model.memory)]

    await answers.submit(prompts, named_tokens(body))
    return texts[0]


def check(body: ChatBody, limits: ServerSettings) -> None:
    """Refuse chats beyond the limits.

    Raises:
        ApiError: says which.
    """
    if len(body.messages) > limits.max_messages:
        raise refused(f"a chat may have {limits.max_messages} messages, not {len(body.messages)}", "messages")
    parts = (part for message in body.messages if isinstance(message.content, list) for part in message.content)
    pictures = sum(part.type == "image_url" for part in parts)
    if pictures > limits.max_pictures:
        raise refused(f"a chat may have {limits.max_pictures} pictures in all its messages, not {pictures}", "messages")


def _choice(answers: Answers, index: int, tools: Tools | None) -> dict[str, Any]:
    written = answers.written[index]
    text, finished = "".join(written.text), written.finished
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if tools is not None:
        content, found = tools.format.parse(text)
        if found:
            message |= {"content": content or None, "tool_calls": tools.calls(found)}
            finished = "tool_calls" if finished == "stop" else finished
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(answers.model.texts, written.choices) if answers.settings.logprobs is not None else None,
        "finish_reason": finished,
    }


class Chunks:
    """A streamed chat: chunks as pieces come; an answer's first one names its role, its last one says why it ended.

    Args:
        answers: the answers.
        prompt: the prompt as text.
        body: the request.
        tools: whose calls are held back until they are whole.
        head: id, time and model of every chunk.
    """

    def __init__(
        self, answers: Answers, prompt: str, body: ChatBody, tools: Tools | None, head: dict[str, Any]
    ) -> None:
        self._answers, self._prompt, self._tools = answers, prompt, tools
        self._head = {**head, "object": "chat.completion.chunk"}
        self._with_usage = body.stream_options is not None and body.stream_options.include_usage
        self._begun: set[int] = set()
        self._readers: dict[int, ToolStream] = {}
        if tools is not None:
            self._readers = {index: tools.format.stream() for index in range(len(answers.written))}

    async def events(self) -> AsyncIterator[bytes]:
        """Everything to send."""
        async for pieces in self._answers.pieces(waiting=True):
            data = [chunk for index, piece in pieces for chunk in self._of(index, piece)]
            if data or not pieces:
                yield b"".join(data) or WAITING
        await self._answers.remember(self._prompt)
        if self._with_usage:
            yield event({**self._head, "choices": [], "usage": usage(self._answers)})
        yield DONE

    def _of(self, index: int, piece: Piece) -> list[bytes]:
        text, found = piece.text, []
        if self._tools is not None:
            text = self._readers[index].push(text)
            if piece.finished is not None:
                rest, calls = self._readers[index].finish()
                text, found = text + rest, self._tools.calls(calls)
        delta: dict[str, Any] = {} if index in self._begun else {"role": "assistant", "content": ""}
        if text:
            delta["content"] = text
        if found:
            delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(found)]
        chunks = []
        if delta or told(piece):
            self._begun.add(index)
            logprobs = _logprobs(self._answers.model.texts, [piece.choice]) if told(piece) else None
            chunks.append(self._chunk(index, delta, logprobs, None))
        if piece.finished is not None:
            finished = self._answers.written[index].finished
            chunks.append(self._chunk(index, {}, None, "tool_calls" if found and finished == "stop" else finished))
        return chunks

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: Any, finished: str | None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finished}
        rest: dict[str, Any] = {"usage": None} if self._with_usage else {}
        return event({**self._head, "choices": [choice], **rest})


def _logprobs(texts: TokenTexts, choices: list[Choice]) -> dict[str, Any]:
    """Tokens with their log-probabilities and alternatives, in OpenAI's form for chats."""
    content = [
        {**_token(texts, choice.token, choice.logprob), "top_logprobs": [_token(texts, *pair) for pair in choice.top]}
        for choice in choices
    ]
    return {"content": content, "refusal": None}


def _token(texts: TokenTexts, token: int, logprob: float | None) -> dict[str, Any]:
    return {"token": texts.text(token), "logprob": logprob, "bytes": list(texts.bytes(token))}
