"""Tokenizer files of a package: streaming text for any bytes, and chat templates in a sandbox."""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import runtime_toys as toys
from hypothesis import given, settings
from hypothesis import strategies as st

from roundexport.errors import ArtifactError, UnsupportedError, UsageError
from roundexport.runtime.detokenizer import Detokenizer
from roundexport.runtime.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    toys.write_tokenizer(made)
    return made


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As sentencepiece models are converted: pieces with ▁ for a space, unknown characters as <0x..> bytes."""
    from tokenizers import Tokenizer as Raw
    from tokenizers import decoders, models, normalizers

    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁the", "▁sea", "a", "b", "s", "e", "t", "h"]
    raw = Raw(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made = tmp_path_factory.mktemp("byte_fallback")
    raw.save(str(made / "tokenizer.json"))
    return made


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_pieces_joined_are_the_text(folder: Path, text: str) -> None:
    tokenizer = Tokenizer(folder)
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text.rstrip("\ufffd")
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="the sea é日😀\n", max_size=40))
def test_pieces_joined_are_the_text_with_byte_fallback(byte_fallback: Path, text: str) -> None:
    tokenizer = Tokenizer(byte_fallback)
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, toys.VOCAB - 1), max_size=60))
def test_any_tokens_stream_to_their_decoded_text(folder: Path, ids: list[int]) -> None:
    tokenizer = Tokenizer(folder)
    text = "".join(stream(tokenizer, ids))
    text.encode("utf-8")
    assert text == tokenizer.decode(ids).rstrip("\ufffd")


def test_a_character_of_several_tokens_comes_whole(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    assert [p for p in stream(tokenizer, tokenizer.encode("a😀b")) if p] == ["a", "😀", "b"]


def test_special_tokens_have_no_text(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("so")
    assert "".join(stream(tokenizer, [toys.EOS, *ids, toys.PAD, *ids])) == "soso"


def with_template(folder: Path, tmp_path: Path, template: Any, **config: Any) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **config}))
    return Tokenizer(tmp_path)


USER = [{"role": "user", "content": "Grüße <b>"}]
TEMPLATE = """{{ bos_token }}{% for m in messages %}
{% if m.role == 'system' %}{% continue %}{% endif %}
[{{ m.role }}] {{ m.content }}
{% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}"""


def test_chat_template_renders_as_transformers_does(folder: Path, tmp_path: Path) -> None:
    tokenizer = with_template(folder, tmp_path, TEMPLATE, bos_token={"content": "<eos>"})
    messages = [{"role": "system", "content": "x"}, *USER]
    assert tokenizer.chat_prompt(messages) == "<eos>[user] Grüße <b>\n[assistant]"
    assert tokenizer.chat_prompt(USER, add_generation_prompt=False) == "<eos>[user] Grüße <b>\n"
    assert tokenizer.encode_chat(USER)[0] == toys.EOS


def test_a_template_file_goes_before_the_config(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("file")
    assert with_template(folder, tmp_path, "config").chat_prompt(USER) == "file"


def test_named_templates_use_the_default(folder: Path, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert with_template(folder, tmp_path, named).chat_prompt(USER) == "plain"


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Grüße <b>"}]'),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Grüße <b>"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ thinking }}", "yes"),
    ],
)
def test_template_helpers(folder: Path, tmp_path: Path, template: str, shown: str) -> None:
    assert with_template(folder, tmp_path, template).chat_prompt(USER, thinking="yes") == shown


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for m in messages %}",
    ],
)
def test_hostile_refusing_and_broken_templates_are_usage_errors(folder: Path, tmp_path: Path, template: str) -> None:
    with pytest.raises(UsageError, match="chat template"):
        with_template(folder, tmp_path, template).chat_prompt(USER)


def test_without_a_template_chat_is_refused(folder: Path) -> None:
    assert not Tokenizer(folder).has_chat_template
    with pytest.raises(UnsupportedError, match="no chat template"):
        Tokenizer(folder).chat_prompt(USER)


def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not a tokenizer"):
        Tokenizer(tmp_path)


def test_texts_are_cut_as_the_library_cuts_them(sample_model: Path) -> None:
    """Special tokens kept; nothing switched on the shared tokenizer, which other threads use at the same time."""
    from tokenizers import Tokenizer as Raw
    from tokenizers.processors import TemplateProcessing

    tokenizer, theirs = Tokenizer(sample_model), Raw.from_file(str(sample_model / "tokenizer.json"))
    around = TemplateProcessing("<a> $A <b>", None, [("<a>", 1), ("<b>", 2)])
    tokenizer.raw.post_processor = theirs.post_processor = around
    theirs.enable_truncation(8)
    texts = ["word " * 50, "so", "", "the sea was calm " * 9]
    found = tokenizer.encode_batch(texts, max_length=8)
    assert [(e.ids, e.type_ids) for e in found] == [(e.ids, e.type_ids) for e in theirs.encode_batch(texts)]
    assert max(len(e.ids) for e in found) == 8
    assert tokenizer.raw.truncation is None
    assert len(tokenizer.encode("word " * 50)) > 50
    with pytest.raises(UsageError, match="2 tokens leave no room"):
        tokenizer.encode_batch(["so"], max_length=2)


def test_a_long_text_stays_whole_while_another_thread_cuts(folder: Path) -> None:
    tokenizer, long = Tokenizer(folder), "the sea was calm " * 30
    whole = len(tokenizer.encode(long))
    with ThreadPoolExecutor(2) as pool:
        cutting = pool.submit(lambda: [tokenizer.encode_batch([long] * 4, 8) for _ in range(100)])
        lengths = {len(tokenizer.encode(long)) for _ in range(100)}
        cutting.result()
    assert lengths == {whole}


@pytest.mark.parametrize("text", ["\ud800", "so \udfff far"])
def test_half_a_surrogate_pair_is_refused(folder: Path, text: str) -> None:
    tokenizer = Tokenizer(folder)
    for call in (tokenizer.encode, lambda t: tokenizer.encode_batch([t]), lambda t: tokenizer.encode_batch([t], 8)):
        with pytest.raises(UsageError, match="half of a surrogate pair"):
            call(text)


def test_the_librarys_bare_exceptions_are_errors_that_name_the_file(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Raw
    from tokenizers import models

    Raw(models.WordLevel({"a": 0}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    for call in (lambda: tokenizer.encode("b"), lambda: tokenizer.encode_batch(["b"]), lambda: tokenizer.decode([-1])):
        with pytest.raises(ArtifactError, match=r"tokenizer\.json: the tokenizer "):
            call()


def test_a_panic_of_the_library_is_an_error_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As pyo3 has it."""

    def panic(*args: Any, **options: Any) -> None:
        raise PanicException("index out of bounds")

    tokenizer = Tokenizer(folder)
    monkeypatch.setattr(tokenizer, "raw", type("Raw", (), {"encode_batch_fast": panic, "decode": panic})())
    with pytest.raises(ArtifactError, match="index out of bounds"):
        tokenizer.encode("a")
    with pytest.raises(ArtifactError, match="index out of bounds"):
        tokenizer.decode([1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[1]", "expected a JSON object, found list"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"bos_token": 3}', "bos_token must be a text"),
        ('{"eos_token": {"text": "x"}, "pad_token": [1]}', "pad_token must be a text"),
        ('{"chat_template": 5}', "chat_template must be a text"),
        ('{"chat_template": [5]}', "chat_template must be a text"),
        ('{"chat_template": [{"name": "default"}]}', "chat_template must be a text"),
        ('{"chat_template": {"default": "x"}}', "chat_template must be a text"),
    ],
)
def test_rubbish_in_tokenizer_config_is_named(folder: Path, tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ArtifactError, match=rf"tokenizer_config\.json: .*{message}"):
        Tokenizer(tmp_path)


def test_ids_without_a_token_have_no_text(folder: Path, tmp_path: Path) -> None:
    """A model's vocabulary is often larger than its tokenizer's, which itself may have gaps."""
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    data["model"]["vocab"]["late"] = toys.VOCAB + 44
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("so")
    row = [toys.VOCAB + 3, *ids, toys.VOCAB + 44, toys.VOCAB + 3, *ids, 100_000]
    assert tokenizer.decode(row) == "".join(stream(tokenizer, row)) == tokenizer.decode(ids) + "lateso"


@pytest.mark.parametrize("which", ["folder", "byte_fallback"])
def test_streams_of_every_script_come_in_whole_characters(which: str, request: pytest.FixtureRequest) -> None:
    tokenizer = Tokenizer(request.getfixturevalue(which))
    ids = tokenizer.encode("爿 🤗 é 👩‍👩‍👧")
    for end in range(len(ids) + 1):  # ended by length, in the middle of a character too
        pieces = stream(tokenizer, ids[:end])
        shown = "".join(pieces)
        assert shown.startswith(tokenizer.decode(ids[:end]).rstrip("\ufffd")) and tokenizer.decode(ids).startswith(
            shown
        )
        assert not any("\ufffd" in piece for piece in pieces)
    assert shown == tokenizer.decode(ids)


CHAT_TEMPLATES = [
    TEMPLATE,
    "{%- if tools %}{{ tools | tojson(indent=2) }}{% endif -%}\n{% for m in messages %}\n"
    "  {%- if loop.first %}<first>{% endif %}\n"
    "    {{- m['role'] + ': ' + m['content'] | trim }}\n{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if ns.n > 1 %}{% break %}{% endif %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endfor %}",
    "{% if tools is defined and tools is none and documents is none and x is undefined %}none{% endif %}"
    "{% for m in messages %}{{ loop.index0 }}/{{ loop.length }} {{ loop.last }}{{ m | tojson }}{{ m.content ~ 1 }}"
    "{{ '%s-%s' % (m.role, m.content | length * 2) }}{% endfor %}{{ '=' * 3 }}{{ strftime_now('%Y') }}",
    "{% macro say(m) %}{{ m.role }}: {{ m.content }}{% endmacro %}{% set all %}"
    "{% for m in messages if m.role == 'user' %}{{ say(m) }}{% endfor %}{% endset %}{{ all }}"
    "{{ messages | map(attribute='role') | join(', ') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages[::-1] | length }}",
]


@pytest.mark.parametrize("template", CHAT_TEMPLATES, ids=["plain", "tools", "generation", "expressions", "macros"])
def test_chat_prompts_equal_those_of_transformers(models: Any, tmp_path: Path, template: str) -> None:
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(models("llama"))
    theirs.chat_template = template
    theirs.save_pretrained(tmp_path)
    messages = [{"role": "user", "content": "\n\t Grüße <b> \n"}, {"role": "assistant", "content": "“Yes”"}]
    tools = [{"name": "f", "description": "größer"}]
    ours = Tokenizer(tmp_path)
    for options in ({"add_generation_prompt": True}, {"add_generation_prompt": False, "tools": tools}):
        wanted = theirs.apply_chat_template(messages, tokenize=False, **options)
        assert ours.chat_prompt(messages, **options) == wanted  # type: ignore[arg-type]
    wanted_ids = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(messages) == wanted_ids


def test_others_run_while_a_long_text_is_encoded(folder: Path) -> None:
    tokenizer, letters = Tokenizer(folder), random.Random(0)
    text = " ".join("".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(60_000))
    with ThreadPoolExecutor(1) as pool:
        encoding, turns = pool.submit(tokenizer.encode, text), 0
        while not encoding.done():
            time.sleep(0.001)
            turns += 1
    assert turns > 10  # it takes a second; where the interpreter's lock is held, this thread gets one turn or two
