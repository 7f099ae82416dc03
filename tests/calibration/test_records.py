"""Records of .jsonl files and datasets: texts, and conversations through the model's own chat template."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from roundexport.calibration.chat import user_turn
from roundexport.calibration.samples import load_calibration
from roundexport.calibration.self_generated import beginnings
from roundexport.calibration.text import encoder_of
from roundexport.errors import UsageError
from roundexport.model.checkpoint import Checkpoint
from roundexport.reports.story import _calibration
from roundexport.tuning.job import Job
from roundexport.tuning.settings import TuneSettings

Models = Callable[[str], Path]

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHATS = [
    [{"role": "user", "content": f"What is {n} times {n}? "}, {"role": "assistant", "content": f"It is {n * n}."}]
    for n in range(40)
]


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n", encoding="utf-8")
    return path


@pytest.fixture
def chatting(models: Models, tmp_path: Path) -> Checkpoint:
    folder = tmp_path / "chatting"
    shutil.copytree(models("llama"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return Checkpoint.open(folder)


def test_a_sample_is_conversations_as_transformers_makes_them(chatting: Checkpoint, tmp_path: Path) -> None:
    file = lines(tmp_path / "chat.jsonl", [{"messages": chat} for chat in CHATS])
    found = load_calibration(chatting, str(file), num_samples=4, sample_len=100)
    tokenizer, rest, rows = AutoTokenizer.from_pretrained(chatting.folder), iter(CHATS), []
    while len(rows) < 4:
        row: list[int] = []
        while len(row) < 100:
            row += tokenizer.apply_chat_template(next(rest), return_dict=True)["input_ids"]
        rows.append(row[:100])
    np.testing.assert_array_equal(found.ids, rows)
    assert found.identity["kind"] == "text" and len(found.identity["chat_template"]) == 64
    assert _calibration(found.identity).startswith("a text file of conversations, in the chat template, 4 samples")


def test_every_other_own_text_of_a_chat_model_begins_with_a_users_turn(chatting: Checkpoint, models: Models) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chatting.folder)
    turn = [tokenizer.bos_token_id, *tokenizer("<user>", add_special_tokens=False)["input_ids"]]
    begun = beginnings(chatting, 5, 4 * len(turn))
    np.testing.assert_array_equal(begun[1::2], [turn, turn])
    np.testing.assert_array_equal(begun[::2], [[0] + [-1] * (len(turn) - 1)] * 3)
    found = load_calibration(chatting, "self", num_samples=5, sample_len=4 * len(turn))
    ids = found.ids
    assert found.identity["begun"] == "every other one with a user's turn"
    np.testing.assert_array_equal(ids[1::2, : len(turn)], begun[1::2])
    assert len({tuple(row) for row in ids[:, len(turn) :].tolist()}) == 5, "the rest is drawn"
    assert (
        "begun" not in load_calibration(Checkpoint.open(models("llama")), "self", num_samples=2, sample_len=16).identity
    )
    for short in (chatting, 4 * len(turn) - 1), (Checkpoint.open(models("llama")), 4 * len(turn)):
        assert beginnings(short[0], 3, short[1]).tolist() == [[0], [0], [0]]


def test_the_space_before_a_users_first_word_is_the_models_to_draw(chatting: Checkpoint) -> None:
    turns = []
    for space in ("", " "):
        template = TEMPLATE.replace("{{ message['content']", f"{space}{{{{ message['content']")
        (chatting.folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        turns.append(user_turn(Checkpoint.open(chatting.folder)))
    assert turns[0] == turns[1] != []


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "no word of it", "{% for"])
def test_a_template_that_shows_no_users_turn_begins_nothing(template: str, chatting: Checkpoint) -> None:
    (chatting.folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert beginnings(Checkpoint.open(chatting.folder), 2, 64).shape == (2, 1)


def test_samples_are_asked_for_with_the_template_that_reads_them(chatting: Checkpoint, tmp_path: Path) -> None:
    file = lines(tmp_path / "chat.jsonl", [{"messages": chat} for chat in CHATS])

    def asked() -> dict[str, Any]:
        return Job.of(chatting.folder, TuneSettings(recipe="rtn", calibration=str(file))).samples_asked()

    before = asked()
    assert asked() == before
    (chatting.folder / "chat_template.jinja").write_text(TEMPLATE.replace("<", "["), encoding="utf-8")
    assert asked() != before


def test_a_byte_order_mark_is_no_part_of_the_text(models: Models, tmp_path: Path) -> None:
    checkpoint, file = Checkpoint.open(models("llama")), tmp_path / "a.jsonl"
    found = []
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_text(json.dumps({"text": "some text of no matter " * 20}), encoding=encoding)
        found.append(load_calibration(checkpoint, str(file), num_samples=1, sample_len=16).ids)
    np.testing.assert_array_equal(*found)


def test_sharegpts_form_is_the_same(chatting: Checkpoint, tmp_path: Path) -> None:
    names = {"user": "human", "assistant": "gpt"}
    told = [[{"from": names[m["role"]], "value": m["content"]} for m in chat] for chat in CHATS]
    one = lines(tmp_path / "one.jsonl", [{"messages": chat} for chat in CHATS])
    other = lines(tmp_path / "other.jsonl", [{"id": 1, "conversations": chat} for chat in told])
    first, second = (load_calibration(chatting, str(file), num_samples=3, sample_len=64) for file in (one, other))
    np.testing.assert_array_equal(first.ids, second.ids)


def test_without_a_template_conversations_are_plain_text_and_that_is_said(models: Models, tmp_path: Path) -> None:
    file = lines(tmp_path / "chat.jsonl", [{"messages": chat} for chat in CHATS])
    checkpoint = Checkpoint.open(models("llama"))
    found = load_calibration(checkpoint, str(file), num_samples=2, sample_len=64)
    text = "\n\n".join("\n".join(message["content"] for message in chat) for chat in CHATS)
    np.testing.assert_array_equal(found.ids.ravel(), encoder_of(checkpoint)(text, False)[:128])
    assert "has no chat template" in found.notes[0] and found.identity["chat_template"] == "none"


def test_texts_of_records_are_joined_by_blank_lines(models: Models, tmp_path: Path) -> None:
    texts = [f"record {n} of the file\nin two lines" for n in range(30)]
    file = lines(tmp_path / "texts.jsonl", [{"text": text, "id": 7} for text in texts])
    checkpoint = Checkpoint.open(models("llama"))
    found = load_calibration(checkpoint, str(file), num_samples=2, sample_len=64)
    np.testing.assert_array_equal(found.ids.ravel(), encoder_of(checkpoint)("\n\n".join(texts), False)[:128])
    assert "chat_template" not in found.identity


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ('{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("[1]", "line 1 holds list; every line is one JSON object"),
        ("\n\n", "there are no records in it"),
        ('{"question": "?", "answer": "!"}', r"columns question, answer; one of text.* or messages, conversations"),
        ('{"text": "a"}\n{"messages": []}', "record 2 has no text that is a text"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n{"text": "b"}', "record 2 has no messages that is a list"),
        ('{"text": "a"}\n{"text": "b \\ud83d"}', r"record 2 holds '\\ud83d', half of a surrogate pair"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', r"record 1 holds '\\ud83d', half of a surrogate"),
        ('{"messages": ["a"]}', "record 1: a message is an object with role and content"),
        ('{"conversations": [{"from": "gpt", "value": null}]}', "the message of assistant has no content"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "record 1: the chat template refuses.*no tools here"),
        ('{"messages": [{"role": "user", "content": "a"}]}', r"conversations of \d+ tokens, one sample takes 64"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(content: str, error: str, chatting: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "wrong.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=error):
        load_calibration(chatting, str(file), num_samples=2, sample_len=64)


def test_a_datasets_conversations_go_through_the_template_too(
    chatting: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("datasets")
    module.load_dataset = lambda *_, **__: iter([{"prompt": "?", "messages": chat} for chat in CHATS])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    found = load_calibration(chatting, "owner/chats", num_samples=4, sample_len=100)
    file = lines(tmp_path / "chat.jsonl", [{"messages": chat} for chat in CHATS])
    same = load_calibration(chatting, str(file), num_samples=4, sample_len=100)
    np.testing.assert_array_equal(found.ids, same.ids)
    assert found.identity["kind"] == "dataset" and found.identity["chat_template"] == same.identity["chat_template"]
