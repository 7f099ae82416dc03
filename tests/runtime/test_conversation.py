"""A chat reads nothing twice, says what a fresh reading would say, and forgets by its rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import runtime_toys as toys
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers

from roundexport.errors import UnsupportedError, UsageError
from roundexport.runtime import Decoder, GenerationSettings, load
from roundexport.runtime.conversation import Conversation
from roundexport.runtime.drafting import PromptLookup
from roundexport.runtime.prompt_memory import PromptMemory
from roundexport.runtime.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<pad>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<pad>assistant\n{% endif %}"
)
SYSTEM = "You are an old man who knows the sea."


@pytest.fixture(scope="module", params=["ort", "ov"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("chat") / request.param
    folder.mkdir()
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    found = load(toys.KINDS[request.param][0](folder), threads=1, precise=True)
    assert isinstance(found, Decoder)
    return found


@pytest.fixture
def chat(decoder: Decoder) -> Iterator[Conversation]:
    conversation = Conversation(decoder, SYSTEM)
    yield conversation
    conversation.close()


def settings(seed: int = 0, **changes: int) -> GenerationSettings:
    values = {"max_new_tokens": 12, "seed": seed, **changes}
    return GenerationSettings(temperature=0.8, **values)  # type: ignore[arg-type]


def say(chat: Conversation, question: str, asked: GenerationSettings) -> str:
    text = "".join(chat.ask(question, asked))
    assert text == chat.turns[-1].text
    return text


def test_ten_turns_read_no_token_twice(decoder: Decoder, chat: Conversation) -> None:
    halves = [token for token in range(toys.VOCAB) if "\ufffd" in decoder.tokenizer.decode([token])]
    asked = replace(settings(), logit_bias=dict.fromkeys(halves, -1000.0))
    held = 0  # tokens that the cache has: all but the last one, which no run has read
    for turn in range(10):
        say(chat, f"What did the {turn}th wave bring?", replace(asked, seed=turn))
        done = chat.turns[-1]
        assert done.finished in ("length", "eos") and done.counts.written > 1
        assert (done.counts.reused, done.counts.read) == (held, done.prompt_tokens - held)
        held = done.prompt_tokens + done.counts.written - 1
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 10]
    assert chat.counts.read < held and chat.counts.reused > 9 * chat.turns[0].prompt_tokens


def test_every_turn_says_what_a_fresh_reading_of_its_tokens_says(decoder: Decoder, chat: Conversation) -> None:
    memory = PromptMemory(decoder.tokenizer)
    for turn in range(4):
        messages = [*chat.messages, {"role": "user", "content": f"And {turn}?"}]
        prompt = decoder.tokenizer.chat_prompt(messages)
        ids = memory.encode(prompt)
        answer = decoder.answer(ids, settings(turn))
        fresh = "".join(step.text[0] for step in decoder.generate([ids], settings(turn)))
        assert say(chat, f"And {turn}?", settings(turn)) == fresh
        answer.tokens += [token for step in decoder.generate([ids], settings(turn)) for token in step.tokens if token]
        memory.answered(prompt, answer, fresh)


def test_guesses_change_no_turn(decoder: Decoder, chat: Conversation) -> None:
    guessed = Conversation(decoder, SYSTEM, drafter=PromptLookup(shortest=1))
    for turn in range(4):
        question = "the sea and the sea and the " * 3
        assert say(chat, question, settings(turn)) == say(guessed, question, settings(turn))
    assert guessed.counts.runs + guessed.counts.accepted == chat.counts.runs
    guessed.close()


def test_a_stopped_answer_stays_as_far_as_it_came(chat: Conversation) -> None:
    pieces = chat.ask("Tell me everything.", settings(max_new_tokens=100))
    shown = next(pieces) + next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert chat.history[-1] == {"role": "assistant", "content": shown}
    assert chat.turns[-1].finished == "stopped" and chat.turns[-1].text == shown
    say(chat, "Go on.", settings())
    assert chat.turns[-1].counts.reused >= chat.turns[0].prompt_tokens


def test_a_question_without_any_answer_leaves(chat: Conversation) -> None:
    assert say(chat, "Hello?", GenerationSettings(logit_bias={toys.EOS: 1000.0})) == "" and chat.history == []
    say(chat, "Hello?", settings())
    chat.reset()
    assert chat.messages == [{"role": "system", "content": SYSTEM}]


def test_the_oldest_turns_leave_when_the_context_is_full(decoder: Decoder, chat: Conversation) -> None:
    for turn in range(16):
        say(chat, f"Question {turn}: " + "wave " * 20, settings(turn))
        assert chat.turns[-1].prompt_tokens + 12 <= toys.CONTEXT
    forgotten = [turn.forgotten for turn in chat.turns]
    assert sum(forgotten) > 4 and sum(n > 0 for n in forgotten) < 4  # several at once, seldom
    assert chat.messages[0] == {"role": "system", "content": SYSTEM}
    assert chat.history[0]["content"].startswith(f"Question {sum(forgotten)}:")
    with pytest.raises(UsageError, match="max_context"):
        say(chat, "word " * 700, settings())
    assert chat.history[-1]["role"] == "assistant" and len(chat.turns) == 16


def test_a_package_without_a_template_is_refused(toy: Callable[[str], Path]) -> None:
    plain = load(toy("ort"))
    assert isinstance(plain, Decoder)
    with pytest.raises(UnsupportedError, match="no chat template"):
        Conversation(plain)


def split(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token per character: not what the tokenizer would make of it."""
    return [id for char in text for id in tokenizer.encode(char, add_special_tokens=False)]


def test_a_remembered_beginning_keeps_its_tokens(decoder: Decoder) -> None:
    tokenizer = decoder.tokenizer
    memory, odd = PromptMemory(tokenizer), split(tokenizer, "the sea")
    assert odd != tokenizer.encode("the sea")
    memory.remember("the sea", odd)
    for rest in ("", "<eos>\n<pad>user\nwhat", " was calm", "é日本"):
        assert memory.encode("the sea" + rest) == odd + (tokenizer.encode(rest) if rest else [])
    assert memory.encode("the se") == tokenizer.encode("the se")
    memory.remember("the sea<eos>", [*odd, 0])
    assert memory.encode("the sea<eos>!") == [*odd, 0, *tokenizer.encode("!")]


def test_the_texts_used_last_are_remembered(decoder: Decoder) -> None:
    memory, tokenizer = PromptMemory(decoder.tokenizer, size=2), decoder.tokenizer
    odd = {text: split(tokenizer, text) for text in ("the sea", "the old man", "the boat")}
    memory.remember("the sea", odd["the sea"])
    memory.remember("the old man", odd["the old man"])
    memory.encode("the sea")
    memory.remember("the boat", odd["the boat"])
    assert [memory.encode(text) == ids for text, ids in odd.items()] == [True, False, True]


def test_a_joint_that_would_add_a_space_is_tokenized_anew(tmp_path: Path) -> None:
    """SentencePiece's way: a text by itself begins with ▁."""
    vocabulary = {"<unk>": 0, "</s>": 1, "▁": 2, "a": 3, "b": 4, "▁a": 5, "▁b": 6}
    raw = RawTokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Metaspace(prepend_scheme="first")
    raw.add_special_tokens(["</s>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    memory = PromptMemory(tokenizer)
    memory.remember("a", [5])
    assert memory.encode("ab") == tokenizer.encode("ab") == [5, 4]  # not [5, 6], which is "a b"
    assert memory.encode("a b") == [5, 6] and memory.encode("a</s>b") == [5, 1, 4]
