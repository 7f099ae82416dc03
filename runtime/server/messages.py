"""Messages of a chat as chat templates know them, rendered; for a worker thread.

Templates expect a message's content as one text, and the arguments of a call as an object, not as JSON in a text.
OpenAI's newer role ``developer`` is ``system`` to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from roundexport.errors import UnsupportedError
from roundexport.storage.strict_json import too_deep

from .answers import check_bytes
from .errors import refused
from .models import DecoderModel
from .pictures import picture_part
from .requests import ChatBody, ContentPart, Message

_RESERVED = ("messages", "tools", "add_generation_prompt", "documents")  # names that are not the caller's to set


def render(
    model: DecoderModel, body: ChatBody, tools: list[dict[str, Any]] | None, between: Callable[[], None]
) -> tuple[list[dict[str, Any]], str]:
    """The messages of a chat as a template knows them, pictures read, and the prompt as text.

    Args:
        model: whose template and tokenizer.
        body: the request.
        tools: told to the template.
        between: called before each part of a message, of which a picture is dear; raises where nobody waits any more.

    Raises:
        ApiError: it cannot fit, a part is not text, or the package has no chat template.
        UsageError: the template refuses these messages.
    """
    messages = [as_message(model, message, number, between) for number, message in enumerate(body.messages)]
    context, longest = model.max_context, model.longest
    check_bytes(sum(map(_length, messages)), longest, context)
    variables = dict(body.chat_template_kwargs or {})
    if wrong := [name for name in _RESERVED if name in variables]:
        raise refused(f"chat_template_kwargs cannot set {wrong[0]}", "chat_template_kwargs")
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
    try:
        prompt = model.decoder.chat_text(messages, **{**variables, "tools": tools})
    except UnsupportedError as error:
        raise refused(f"the model {model.name!r} has no chat template; use /v1/completions", "model") from error
    check_bytes(len(prompt), longest, context)
    return messages, prompt


def as_message(model: DecoderModel, message: Message, number: int, between: Callable[[], None]) -> dict[str, Any]:
    """A message as a template's value.

    Raises:
        ApiError: a part of it is not text, or a call's arguments are not JSON.
    """
    where = f"messages[{number}].content"
    content: Any = message.content
    if isinstance(content, list):
        parts = []
        for part in content:
            between()
            parts.append(_part(model, part, where))
        texts = [part["text"] for part in parts if part["type"] == "text"]
        content = "".join(texts) if len(texts) == len(parts) else parts
    if content is None and not message.tool_calls:
        raise refused(f"{where} must be a text", where)
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": content or ""}
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


def _part(model: DecoderModel, part: ContentPart, where: str) -> dict[str, Any]:
    if part.type == "image_url" and model.decoder.sees:
        return picture_part(model, part, where)
    if part.type != "text" or part.text is None:
        raise refused(f"{where}: this model reads text, not {part.type[:50]!r}", where)
    return {"type": "text", "text": part.text}


def _length(message: Mapping[str, Any]) -> int:
    """Characters of a message's text."""
    content = message["content"]
    return len(content) if isinstance(content, str) else sum(len(part.get("text", "")) for part in content)


def _arguments(text: str, number: int) -> Any:
    try:
        found = msgspec.json.decode(text)
        if isinstance(found, dict | list) and too_deep(found):
            raise RecursionError
        return found
    except (msgspec.DecodeError, ValueError, RecursionError):  # the first is not a ValueError before msgspec 0.21
        where = f"messages[{number}].tool_calls"
        raise refused(f"{where}: the arguments of a call are not JSON, or nested too deeply", where) from None
