"""Answers in a given form: JSON by a schema, calls of tools, through the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from server_toys import Running

ASKED: dict[str, Any] = {"model": "talker", "messages": [{"role": "user", "content": "Which city?"}], "max_tokens": 120}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "far": {"type": "boolean"}},
    "required": ["city", "far"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "travel", "description": "Go there.", "parameters": CITY}},
    {"type": "function", "function": {"name": "stay"}},
]


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.v1, api_key="unused", max_retries=0) as found:
        yield found


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_by_a_schema(client: openai.OpenAI, seed: int) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    found = client.chat.completions.create(**ASKED, seed=seed, response_format=form)
    value = json.loads(found.choices[0].message.content or "")
    assert value["city"] in ("Paris", "Rome") and isinstance(value["far"], bool)
    assert found.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(**ASKED, seed=seed, response_format=form, stream=True)
    assert json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks)) == value


def test_any_object(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(**ASKED, temperature=0, response_format={"type": "json_object"})
    assert (found.choices[0].message.content or "").lstrip().startswith("{")
    plain = client.chat.completions.create(**ASKED, temperature=0, response_format={"type": "text"})
    assert plain.choices[0].message.content == client.chat.completions.create(
        **ASKED, temperature=0
    ).choices[0].message.content  # fmt: skip


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "travel"}}])
def test_a_call_that_must_be_made(client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {**ASKED, "seed": 1, "tools": TOOLS, "tool_choice": choice}
    if choice == "required":
        asked["tools"] = TOOLS[:1]  # the other one's arguments may be anything, and a toy never ends them
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    [call] = whole.message.tool_calls or []
    assert call.type == "function" and call.function.name == "travel" and len(call.id) == 9 and call.id.isalnum()
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    chunks = list(client.chat.completions.create(**asked, stream=True))
    found = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
    assert [(c.index, c.function and c.function.arguments) for c in found] == [(0, call.function.arguments)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_model_that_calls_nothing_answers(server: Running, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {**ASKED, "temperature": 0, "tools": TOOLS}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.tool_calls is None and whole.choices[0].message.content
    assert whole.choices[0].finish_reason in ("stop", "length")
    chunks = client.chat.completions.create(**asked, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    # The template was told of the tools, unless none is to be called.
    silent = client.chat.completions.create(**asked, tool_choice="none")
    bare = client.chat.completions.create(**ASKED, temperature=0)
    assert whole.usage is not None and silent.usage is not None and bare.usage is not None
    assert whole.usage.prompt_tokens > silent.usage.prompt_tokens == bare.usage.prompt_tokens


def test_a_conversation_with_calls_goes_on(client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "Go."},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "tool_calls": [
                {"id": "call-1", "type": "function", "function": {"name": "travel", "arguments": '{"city": "Rome"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "call-1", "content": "arrived"},
    ]
    found = client.chat.completions.create(model="talker", messages=messages, max_tokens=5, tools=TOOLS)
    assert found.choices[0].message.role == "assistant"
