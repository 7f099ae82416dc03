"""Single parts of the server: settings that refuse nonsense, names, defaults, texts of tokens, the page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import runtime_toys as toys

from roundexport.errors import ArtifactError, RoundexportError, UnsupportedError, UsageError
from roundexport.runtime.server.models import longest_token, open_models, split_name
from roundexport.runtime.server.page import HEADERS, Page
from roundexport.runtime.server.security import KEY_VARIABLE, host_name, read_keys
from roundexport.runtime.server.settings import ServerSettings, is_loopback
from roundexport.runtime.server.token_texts import TokenTexts
from roundexport.runtime.server.wishes import defaults_of
from roundexport.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from server_toys import Running


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rows": 0}, "rows must"),
        ({"queue": -1}, "queue must be at least 1"),
        ({"max_tokens": 0}, "max_tokens must"),
        ({"port": 65536}, "port must be"),
        ({"request_s": -1.0}, "request_s must be"),
        ({"drain_s": float("nan")}, "drain_s must be"),
        ({"max_choices": 65}, "must not exceed queue"),
        ({"keys": ("",)}, "a key is"),
        ({"keys": ("schlüssel",)}, "a key is"),
        ({"host": "0.0.0.0"}, "a key must be asked for"),
        ({"host": "::"}, "a key must be asked for"),
        ({"host": "example.org"}, "a key must be asked for"),
    ],
)
def test_settings_refuse_nonsense(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ServerSettings(**values)
    if "host" in values:
        assert not ServerSettings(**values, keys=("long-enough",)).loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "a.localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "10.0.0.1", "localhost.evil.example", "127.0.0.1.evil.example", "x"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("host", "name"),
    [("A:80", "a"), ("a", "a"), ("[::1]:80", "[::1]"), ("[::1]", "[::1]"), ("::1", "::1"), ("", ""), (":80", ":80")],
)
def test_host_names(host: str, name: str) -> None:
    assert host_name(host) == name


def test_keys_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert read_keys(None) == ()
    monkeypatch.setenv(KEY_VARIABLE, "from-outside")
    assert read_keys(None) == ("from-outside",)
    path = tmp_path / "keys"
    path.write_text("first-key\nsecond-key\n")
    assert read_keys(path) == ("first-key", "second-key")
    for text, words in (("", "no key in it"), ("short", "at least 8 characters")):
        path.write_text(text)
        with pytest.raises(UsageError, match=words):
            read_keys(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_names_of_packages(tmp_path: Path) -> None:
    assert split_name("out/onnx")[0] == "out-onnx"
    assert split_name("models/my model")[0] == "my-model"
    assert split_name("small=out/onnx") == ("small", Path("out/onnx"))
    (tmp_path / "a=b").mkdir()
    assert split_name(str(tmp_path / "a=b")) == ("a-b", tmp_path / "a=b")
    with pytest.raises(UsageError, match="cannot be a model's name"):
        split_name("a/b=out/onnx")


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, {"temperature": 1.0}),
        ({"temperature": 0.6}, {"temperature": 1.0}),  # transformers would not sample at all
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, {"temperature": 0.6, "top_k": 20}),
        ({"do_sample": True, "top_p": None}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": -1}, None),
        ({"do_sample": True, "temperature": "hot"}, None),
    ],
)
def test_how_a_package_wants_to_be_sampled(config: dict[str, Any], wanted: dict[str, float] | None) -> None:
    if wanted is None:
        with pytest.raises(ArtifactError, match=r"generation_config\.json"):
            defaults_of(config, "generation_config.json")
    else:
        assert defaults_of(config, "generation_config.json") == wanted


def test_two_of_one_name_or_none_at_all(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ServerSettings(port=0)
    refused: list[tuple[list[str], type[RoundexportError], str]] = [
        ([], UsageError, "at least one package"),
        ([str(folders["plain"])] * 2, UsageError, "two packages are called plain"),
        ([str(folders["plain"]), str(folders["plain"].parent / "none")], ArtifactError, "none"),
    ]
    for packages, kind, words in refused:
        with pytest.raises(kind, match=words):
            open_models(packages, chosen)


def test_texts_of_tokens(tmp_path: Path) -> None:
    toys.write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode("naïve 爿 the sea")
    assert b"".join(map(texts.bytes, ids)).decode() == "naïve 爿 the sea"
    assert texts.text(toys.EOS) == "<eos>" and texts.bytes(100_000) == b""
    half = next(token for token in ids if len(texts.bytes(token)) == 1 and texts.bytes(token) > b"\x7f")
    assert texts.text(half) == "\ufffd" and texts.key(half) == f"bytes:\\x{texts.bytes(half)[0]:02x}"
    assert longest_token(tokenizer) >= max(len(texts.bytes(token)) for token in range(toys.VOCAB))


def test_texts_of_tokens_with_byte_fallback(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Raw
    from tokenizers import decoders, models

    words = ["<unk>", "<0xE2>", "▁the", "sea"]
    raw = Raw(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.save(str(tmp_path / "tokenizer.json"))
    texts = TokenTexts(Tokenizer(tmp_path))
    assert [texts.bytes(i) for i in range(4)] == [b"<unk>", b"\xe2", b" the", b"sea"]


def test_the_page(server: Running, tmp_path: Path) -> None:
    for name in ("index.html", "app.js", "style.css", "secret.txt", ".hidden"):
        (tmp_path / name).write_text(name)
    page = Page(tmp_path)
    assert sorted(page.names) == ["app.js", "index.html", "style.css"]
    assert "'unsafe" not in HEADERS["content-security-policy"]
    for path in ("/page/../app.py", "/page/..%2fapp.py", "/page/none.js", "/page/"):
        assert server.client.get(f"{server.url}{path}").status_code == 404
    if "index.html" in Page().names:
        found = server.client.get(server.url)
        assert found.headers["content-type"].startswith("text/html") and "content-security-policy" in found.headers
        again = server.client.get(server.url, headers={"if-none-match": found.headers["etag"]})
        assert again.status_code == 304 and not again.content


def test_the_description_has_every_path(server: Running) -> None:
    found = server.client.get(f"{server.url}/openapi.json").json()
    described = {path.replace("{name}", "talker") for path in found["paths"]}
    for path, ways in found["paths"].items():
        if "get" in ways:
            assert server.client.get(f"{server.url}{path.replace('{name}', 'talker')}").status_code == 200
    assert {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank", "/v1/models/talker"} <= described
    assert found["components"]["schemas"]["ChatBody"]["additionalProperties"] is False


def test_a_vendors_loop_is_not_served(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from roundexport.runtime.server import models
    from roundexport.runtime.vendor_loop import LoopDecoder

    monkeypatch.setattr(models, "load", lambda *a, **k: object.__new__(LoopDecoder))
    with pytest.raises(UnsupportedError, match="serve with engine auto"):
        open_models([str(folders["plain"])], ServerSettings(port=0))


def test_the_runtime_imports_nothing_of_the_server() -> None:
    code = (
        "import sys, roundexport.runtime, roundexport.cli.serving;"
        "print(sorted(m for m in ('starlette', 'msgspec', 'uvicorn', 'prometheus_client') if m in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert out.stdout.strip() == "[]"
