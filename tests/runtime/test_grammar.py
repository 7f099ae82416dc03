"""Answers held to a form: always one that the form allows, ended when it is complete, the same with guesses."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runtime_toys as toys
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers

from roundexport.errors import UnsupportedError, UsageError
from roundexport.runtime import Decoder, GenerationSettings, load
from roundexport.runtime.answer import Answer
from roundexport.runtime.batch import Batch, Drafter
from roundexport.runtime.drafting import PromptLookup
from roundexport.runtime.grammar import Grammars
from roundexport.runtime.settings import Grammar

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["sea", "land", "naïve “é” 日本"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "names": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,4}$"}, "maxItems": 2},
        "deep": {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]},
    },
    "required": ["kind", "size", "names", "deep"],
    "additionalProperties": False,
}
SCHEMA["properties"]["deep"]["additionalProperties"] = False
JSON = Grammar("json_schema", json.dumps(SCHEMA))
REGEX = r"[A-Z][a-z]{2,5}, [0-9]{1,3} (é|日本)!"
LARK = 'start: pair ("; " pair){1,2}\npair: WORD "=" (WORD | "(" pair ")")\nWORD: /[a-z]{1,3}/\n'


@pytest.fixture(scope="module", params=["ort", "ov"])
def decoder(request: pytest.FixtureRequest, toy: Callable[[str], Path]) -> Decoder:
    found = load(toy(request.param), threads=1, precise=True)
    assert isinstance(found, Decoder)
    return found


def settings(grammar: Grammar, seed: int = 0, **changes: Any) -> GenerationSettings:
    return GenerationSettings(
        **{"max_new_tokens": 400, "temperature": 1.0, "seed": seed, "grammar": grammar, **changes}
    )


def write(decoder: Decoder, *answers: Answer, drafter: Drafter | None = None) -> list[tuple[str, str | None]]:
    batch = Batch(decoder.backend, drafter=drafter)
    texts = dict.fromkeys(answers, "")
    for answer in answers:
        batch.admit(answer)
    while len(batch):
        for answer, piece in batch.advance():
            texts[answer] += piece.text
    batch.close()
    return [(texts[answer], answer.finished) for answer in answers]


# At 1 this toy is so sure of itself that four seeds may write the same.
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_json_has_the_schemas_form(decoder: Decoder, temperature: float) -> None:
    asked = [decoder.answer([5, 9], settings(JSON, seed, temperature=temperature)) for seed in range(4)]
    found = write(decoder, *asked)
    for text, finished in found:
        value = json.loads(text)
        assert finished == "stop" and list(value) == list(SCHEMA["properties"])
        assert value["kind"] in SCHEMA["properties"]["kind"]["enum"] and 0 <= value["size"] <= 99
        assert len(value["names"]) <= 2 and all(re.fullmatch("[a-z]{1,4}", name) for name in value["names"])
        assert value["deep"]["yes"] in (True, False)
    assert len(set(found)) == 1 if temperature == 0 else len(set(found)) > 1


@pytest.mark.parametrize("seed", range(3))
def test_a_regex_and_a_grammar_hold_whole_answers(decoder: Decoder, seed: int) -> None:
    [(text, finished)] = write(decoder, decoder.answer([5], settings(Grammar("regex", REGEX), seed)))
    assert re.fullmatch(REGEX, text) and finished == "stop"
    [(text, finished)] = write(decoder, decoder.answer([5], settings(Grammar("lark", LARK), seed)))
    pair = "[a-z]{1,3}=([a-z]{1,3}|[(][a-z=()]+[)])"
    assert re.fullmatch(f"{pair}(; {pair}){{1,2}}", text) and text.count("(") == text.count(")")
    assert finished in ("stop", "eos")


def test_where_more_may_come_the_model_ends_the_answer(decoder: Decoder) -> None:
    biased = settings(Grammar("regex", "[a-z]{3,}"), logit_bias={toys.EOS: 100.0})
    [(text, finished)] = write(decoder, decoder.answer([5], biased))
    assert re.fullmatch("[a-z]{3,}", text) and len(text) < 20 and finished == "eos"
    [(text, finished)] = write(decoder, decoder.answer([5], replace(biased, logit_bias={}, max_new_tokens=6)))
    assert finished == "length" or len(text) < 20


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_wrong_guesses_do_not_disturb_the_state(decoder: Decoder, temperature: float) -> None:
    class Nonsense:
        def guess(self, row: object, most: int) -> list[int]:
            return [5, 6, 7][:most]

    asked = settings(JSON, 2, temperature=temperature)
    prompt = decoder.encode('{"kind": "sea", "size": 3, "names": ["ab"], "deep": {"yes": true}} and once more ')
    plain = write(decoder, decoder.answer(prompt, asked))
    for drafter in (Nonsense(), PromptLookup(shortest=1)):
        assert write(decoder, decoder.answer(prompt, asked), drafter=drafter) == plain


def test_twins_have_a_state_of_their_own(decoder: Decoder) -> None:
    prompt = list(range(5, 40))
    together = write(decoder, *(decoder.answer(prompt, settings(JSON), number) for number in range(3)))
    apart = [write(decoder, decoder.answer(prompt, settings(JSON), number))[0] for number in range(3)]
    assert together == apart and len(set(apart)) > 1


def test_streamed_text_before_a_stop_string_or_the_end_of_the_room(decoder: Decoder) -> None:
    [(text, finished)] = write(decoder, decoder.answer([5], settings(Grammar("regex", "aaab(cd)+"), stop=("ab",))))
    assert (text, finished) == ("aa", "stop")
    [(text, finished)] = write(decoder, decoder.answer([5], settings(Grammar("regex", "x{40}"), max_new_tokens=1)))
    assert set(text) == {"x"} and len(text) < 40 and finished == "length"


def test_a_grammar_that_becomes_too_much_work_cuts_its_answer_short(decoder: Decoder) -> None:
    endless, fine = Grammar("regex", "(a?){1000}a{1000}"), Grammar("regex", "b{40}")
    found = write(decoder, *(decoder.answer([5], settings(grammar)) for grammar in (endless, fine)))
    assert found[0][1] == "length" and found[1] == ("b" * 40, "stop")


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("json_schema", '{"type": "banana"}'), "JSON schema.*banana"),
        (Grammar("json_schema", '{"type": "string", "not": {"const": "a"}}'), "JSON schema.*not"),
        (Grammar("json_schema", "{nope"), "JSON schema.*column"),
        (Grammar("regex", "[0-9"), "regular expression.*unclosed"),
        (Grammar("regex", "(?<=a)b"), "regular expression.*look-around"),
        (Grammar("lark", "start: foo"), "grammar.*foo"),
    ],
    ids=str,
)
def test_what_cannot_be_held_is_refused_with_the_reason(
    toy: Callable[[str], Path], grammar: Grammar, reason: str
) -> None:
    decoder = load(toy("ort"), threads=1)
    assert isinstance(decoder, Decoder)
    with pytest.raises(UsageError, match=f"(?s){reason}"):
        decoder.answer([5], settings(grammar))


def test_without_the_library_the_extra_is_named(toy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load(toy("ort"), threads=1)
    assert isinstance(decoder, Decoder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"llguidance.*roundexport\[grammar\]"):
        decoder.answer([5], settings(JSON))


def byte_fallback() -> RawTokenizer:
    """As SentencePiece models have it: ▁ for a space, characters without a token by bytes."""
    words = {"<unk>": 0, "</s>": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    for text in ('"', "{", "}", ":", "▁", "a", "b", "ab", "▁a", '{"', '":'):
        words[text] = len(words)
    tokenizer = RawTokenizer(models.BPE(words, [("a", "b"), ("▁", "a"), ("{", '"'), ('"', ":")], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("logits", [267, 269, 300])
def test_vocabularies_of_other_kinds_and_sizes(logits: int) -> None:
    """A model may have more logits than its tokenizer tokens, or fewer."""
    tokenizer = byte_fallback()
    mask = Grammars(tokenizer, logits, (1,)).mask(Grammar("regex", "é a"))
    seen = []
    while mask.ended is None:
        allowed = np.flatnonzero(np.isfinite(mask.restrict(np.zeros(logits, np.float32))))
        seen.append(int(allowed[0]))
        mask.accept(seen[-1])
    assert tokenizer.decode(seen).startswith("é") and mask.ended == "stop"
