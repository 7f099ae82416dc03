"""Tool calls as models write them: found, told apart from text, and the same however the text is cut."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer

from roundexport.errors import UsageError
from roundexport.runtime import Decoder, GenerationSettings, load
from roundexport.runtime.detokenizer import Detokenizer
from roundexport.runtime.grammar import Grammars
from roundexport.runtime.tokenizer import Tokenizer
from roundexport.runtime.tool_calls import FORMATS, ToolFormat, format_of

BY_NAME = {format.name: format for format in FORMATS}
Call = tuple[str, dict[str, Any]]
PARIS: Call = ("get_weather", {"city": "Paris"})
NESTED: Call = (
    "run",
    {"code": 'if a { say("}]</tool_call>") }', "deep": {"x": [1, {"y": None}]}, "é": "naïve 日本 \\ \n"},
)


def written(call: Call, key: str = "arguments", **more: Any) -> str:
    return json.dumps({**more, "name": call[0], key: call[1]}, ensure_ascii=False)


def hermes(*calls: Call) -> str:
    return "\n".join(f"<tool_call>\n{written(call)}\n</tool_call>" for call in calls)


def named(call: Call, number: str = "") -> str:
    return f"[TOOL_CALLS]{call[0]}{number}[ARGS]{json.dumps(call[1])}"


CASES: list[tuple[str, str, str | None, list[Call]]] = [
    ("hermes", hermes(PARIS), "", [PARIS]),
    ("hermes", "Let me look.\n" + hermes(PARIS, NESTED), "Let me look.", [PARIS, NESTED]),
    ("hermes", "A\n\n" + hermes(PARIS) + "\n B", "A\n\nB", [PARIS]),
    ("hermes", "<think>a <tool_cal b</think>\n\n" + hermes(PARIS), "<think>a <tool_cal b</think>", [PARIS]),
    ("hermes", f"<tool_call>{written(PARIS)}", "", [PARIS]),  # ended without the closing mark
    ("hermes", f"<tool_call>\n{written(PARIS)}\n{written(NESTED)}\n</tool_call>", "", [PARIS, NESTED]),
    ("hermes", '<tool_call>{"name": "now", "arguments": {}}</tool_call>', "", [("now", {})]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", {"a": 1})]),
    ("hermes", "Plain text, a < b, <b>bold</b> \n", "Plain text, a < b, <b>bold</b> \n", []),
    ("hermes", '<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "argum', []),
    ("hermes", "<tool_call>{oops}</tool_call> x", "<tool_call>{oops}</tool_call> x", []),
    ("hermes", "<tool_call>\nprint(1)\n</tool_call>", "<tool_call>\nprint(1)\n</tool_call>", []),
    ("hermes", '<tool_call>{"a": 1}</tool_call>' + hermes(PARIS), '<tool_call>{"a": 1}</tool_call>', [PARIS]),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', None, []),
    ("hermes", "<tool_call>" + "[" * 50_000, "<tool_call>" + "[" * 50_000, []),
    ("hermes", '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 5000 + "1" + "}" * 5001, None, []),
    ("hermes", '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 200 + "1" + "}" * 201 + "</tool_call>", None, []),
    ("hermes", "", "", []),
    ("llama3", written(PARIS, "parameters"), "", [PARIS]),
    ("llama3", "<|python_tag|>" + written(PARIS, "parameters", type="function"), "", [PARIS]),
    ("llama3", f"{written(PARIS, 'parameters')}; {written(NESTED, 'parameters')}", "", [PARIS, NESTED]),
    ("llama3", f"\n  {written(PARIS, 'parameters')}\n{written(PARIS, 'parameters')};\n", "", [PARIS, PARIS]),
    ("llama3", f"Sure:\n{written(PARIS, 'parameters')}\nDone.", "Sure:\nDone.", [PARIS]),
    ("llama3", json.dumps({"type": "function", "function": {"name": "f", "parameters": {}}}), "", [("f", {})]),
    ("llama3", '{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}', []),
    ("llama3", '{"name": "f", "parameters": {"a"', '{"name": "f", "parameters": {"a"', []),
    ("llama3", "a {x} b; {y}\n{z} \n", "a {x} b; {y}\n{z} \n", []),
    ("llama3", "<|python_tag|>print('hi')", "<|python_tag|>print('hi')", []),
    ("mistral", f"[TOOL_CALLS][{written(PARIS)}, {written(NESTED)}]", "", [PARIS, NESTED]),
    ("mistral", f"[TOOL_CALLS] [{written(PARIS, id='abc')}]", "", [PARIS]),
    ("mistral", f" [{written(PARIS)}]", "", [PARIS]),  # the mark is a special token and was not shown
    ("mistral", f"I look.[TOOL_CALLS][{written(PARIS)}]", "I look.", [PARIS]),
    ("mistral", "[1, 2] and [{see}] [TOOL", "[1, 2] and [{see}] [TOOL", []),
    ("mistral", "[TOOL_CALLS][]", "[TOOL_CALLS][]", []),
    ("mistral", '[{"a": 1}]', '[{"a": 1}]', []),
    ("mistral-args", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', "", [PARIS]),
    ("mistral-args", f"Hm.{named(PARIS, '[CALL_ID]a1B')}{named(NESTED)}", "Hm.", [PARIS, NESTED]),
    ("mistral-args", "[TOOL_CALLS]get_weather", "[TOOL_CALLS]get_weather", []),
    ("mistral-args", "[TOOL_CALLS]get weather[ARGS]{}", "[TOOL_CALLS]get weather[ARGS]{}", []),
]  # fmt: skip


def parsed(format: ToolFormat, text: str) -> tuple[str, list[Call]]:
    content, calls = format.parse(text)
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES, ids=range(len(CASES)))
def test_text_and_calls_are_told_apart(name: str, text: str, content: str | None, calls: list[Call]) -> None:
    assert parsed(BY_NAME[name], text) == (text if content is None else content, calls)


@pytest.mark.parametrize("chunk", [1, 3, "random"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_stream_gives_the_same_however_it_is_cut(case: int, chunk: int | str) -> None:
    name, text, _, _ = CASES[case]
    if len(text) > 2000:
        text, chunk = text[:2000], 100
    stream, at, shown, draw = BY_NAME[name].stream(), 0, "", random.Random(case)
    while at < len(text):
        step = draw.randint(1, 12) if chunk == "random" else int(chunk)
        shown += stream.push(text[at : at + step])
        at += step
    rest, calls = stream.finish()
    assert (shown + rest, calls) == BY_NAME[name].parse(text)


def test_a_stream_shows_text_at_once_and_never_a_part_of_a_call() -> None:
    stream = BY_NAME["hermes"].stream()
    assert stream.push("Let me") == "Let me" and stream.push(" look: <") == " look:"
    assert stream.push("b> <tool") == " <b>" and stream.push('_call>{"name": "f"') == ""
    assert stream.push(', "arguments": {}}</tool_call>\n') == "" and stream.push("Done") == " Done"


def test_arguments_are_json_that_utf8_can_write() -> None:
    [call] = BY_NAME["hermes"].parse('<tool_call>{"name": "f", "arguments": {"a": "\\ud800", "b": "é"}}</tool_call>')[1]
    assert json.loads(call.arguments.encode().decode()) == {"a": "\ud800", "b": "é"}
    [call] = BY_NAME["hermes"].parse('<tool_call>{"name": "f", "arguments": {"b": "é"}}</tool_call>')[1]
    assert call.arguments == '{"b": "é"}'


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("return a json object within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{\"name\": …", "hermes"),
        ('{{- "<|start_header_id|>" }} {"name": function name, "parameters": dictionary}', "llama3"),
        ("{{ '<|python_tag|>' }}", "llama3"),
        ("{{- '[TOOL_CALLS][' }}", "mistral"),
        ("{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}", "mistral-args"),
        ("<tool_call>\\n<function=example_function_name>\\n<parameter=…", None),  # Qwen3-Coder
        ("<tool_call>{name}\\n<arg_key>…", None),  # GLM
        ("<|im_start|>{{ message['role'] }}", None),
        ("<|tool_call|>[…]<|/tool_call|>", None),  # Phi-4
        ("", None),
    ],
    ids=str,
)  # fmt: skip
def test_the_notation_is_known_by_the_template(source: str, name: str | None) -> None:
    found = format_of(source)
    assert (found and found.name) == name


TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {
        "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"], "additionalProperties": False,
        "$defs": {"city": {"enum": ["Paris", "Oslo"]}}}}},
    {"type": "function", "function": {"name": "add", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["a"],
        "additionalProperties": False}}},
]  # fmt: skip


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: str(format.name))
@pytest.mark.parametrize("name", [None, "add"])
def test_an_answer_can_be_held_to_one_call(toy: Callable[[str], Path], format: ToolFormat, name: str | None) -> None:
    decoder = load(toy("ort"), threads=1)
    assert isinstance(decoder, Decoder)
    asked = GenerationSettings(max_new_tokens=300, temperature=1.0, grammar=format.grammar(TOOLS, name))
    steps = list(decoder.generate([[5]], asked))
    content, [(called, arguments)] = parsed(format, "".join(step.text[0] for step in steps))
    assert content == "" and steps[-1].finished == ("stop",)
    assert called == name if name else called in ("add", "get_weather")
    assert arguments.keys() == ({"a"} if called == "add" else {"city"})


def test_a_tool_that_is_not_given_cannot_be_forced() -> None:
    with pytest.raises(UsageError, match=r"'nap'.*get_weather.*add"):
        BY_NAME["hermes"].grammar(TOOLS, "nap")


def with_marks(folder: Path, toy: Path) -> Tokenizer:
    raw = RawTokenizer.from_file(str(toy / "tokenizer.json"))
    raw.add_special_tokens(["[TOOL_CALLS]", "[ARGS]"])
    raw.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ '[TOOL_CALLS]' }}{{ messages }}", encoding="utf-8")
    return Tokenizer(folder)


def test_marks_that_are_special_tokens_are_shown_when_asked(toy: Callable[[str], Path], tmp_path: Path) -> None:
    tokenizer = with_marks(tmp_path, toy("ort"))
    text = 'Héé [TOOL_CALLS]f[ARGS]{"a": "é"}'
    ids = tokenizer.encode(text)
    for show, wanted in ((BY_NAME["mistral"].marks, text), ((), re.sub(r"\[\w+\]", "", text))):
        detokenizer = Detokenizer(tokenizer, show)
        assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == wanted
    assert (format_of(tokenizer.template_source(tools=True) or "") or FORMATS[0]).name == "mistral"


def test_a_forced_call_begins_with_the_marks_own_token(toy: Callable[[str], Path], tmp_path: Path) -> None:
    raw = with_marks(tmp_path, toy("ort")).raw
    mask = Grammars(raw, raw.get_vocab_size(), (0,)).mask(BY_NAME["mistral"].grammar(TOOLS))
    import numpy as np

    allowed = np.flatnonzero(np.isfinite(mask.restrict(np.zeros(raw.get_vocab_size(), np.float32))))
    assert [raw.id_to_token(int(token)) for token in allowed] == ["[TOOL_CALLS]"]
