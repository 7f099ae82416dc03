"""Tools in a chat: told to the template, their calls read out of the answer; see runtime/tool_calls.py for notations.

    tool_choice   auto (default)             the model decides
                  required, or a named one   the answer is one call, held to its schema by a grammar
                  none                       tools are not told

A package whose template teaches a notation that is not known here refuses tools, rather than giving calls as text.
``parallel_tool_calls: false`` gives the first call alone.  Ids of calls are nine letters and digits, because Mistral's
templates refuse any other.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import msgspec

from roundexport.runtime.settings import Grammar
from roundexport.runtime.tool_calls import ToolCall, ToolFormat, format_of

from .errors import refused
from .models import DecoderModel
from .requests import ChatBody, NamedTool


@dataclass(frozen=True)
class Tools:
    """The tools of a chat.

    Args:
        told: as templates know them.
        format: how the model writes calls.
        grammar: of an answer that must be a call.
        single: tell one call at most.
    """

    told: list[dict[str, Any]]
    format: ToolFormat
    grammar: Grammar | None
    single: bool

    def calls(self, found: list[ToolCall]) -> list[dict[str, Any]]:
        """Calls in OpenAI's form."""
        return [
            {
                "id": secrets.token_hex(5)[:9],
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in (found[:1] if self.single else found)
        ]


def tools_of(body: ChatBody, model: DecoderModel, most: int) -> Tools | None:
    """The tools of a chat; None if it has none, or wants none called.

    Args:
        body: the request.
        model: whose template must know a notation.
        most: tools that there may be.

    Raises:
        ApiError: the template teaches no notation that is known here, a choice names no tool, or there are too many.
    """
    chosen = body.tool_choice
    if not body.tools:
        if chosen not in (None, "none", "auto"):
            raise refused("tool_choice wants a tool called, and there are no tools", "tool_choice")
        return None
    if chosen == "none":
        return None
    if len(body.tools) > most:
        raise refused(f"a chat may have {most} tools, not {len(body.tools)}", "tools")
    source = model.tokenizer.template_source(tools=True)
    format = None if source is None else format_of(source)
    if format is None:
        raise refused(
            f"the chat template of {model.name!r} teaches no notation of tool calls that is known here "
            "(Hermes and Qwen, Llama 3, Mistral); leave tools out",
            "tools",
            "tools_unsupported",
        )
    told: list[dict[str, Any]] = [_plain(tool) for tool in msgspec.to_builtins(body.tools)]
    grammar = None
    if chosen is not None and chosen != "auto":
        if body.response_format is not None and body.response_format.type != "text":
            raise refused("an answer cannot be a call and have another response_format", "response_format")
        name = chosen.function.name if isinstance(chosen, NamedTool) else None
        names = [tool["function"]["name"] for tool in told]
        if name is not None and name not in names:
            raise refused(f"tool_choice names {name[:100]!r}, which is not among the tools", "tool_choice")
        grammar = format.grammar(told, name)
    return Tools(told, format, grammar, body.parallel_tool_calls is False)


def _plain(value: Any) -> Any:
    """Without what was not given."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if one is not None}
    return value
