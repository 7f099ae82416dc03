"""What a server does not do, and how it says so: always in OpenAI's form, never with a 500."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from server_toys import running

if TYPE_CHECKING:
    from server_toys import Running

CHAT = {"model": "talker", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
TEXT = {"model": "plain", "prompt": "Hi", "max_tokens": 4}
VECTOR = {"model": "encoder", "input": "Hi"}
RANK = {"model": "ranker", "query": "sea", "documents": ["a boat"]}
DEEP = (
    b'{"messages": [{"role": "user"}], "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a":'
    + (b"[" * 100_000 + b"]" * 100_000 + b"}}}]}")
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
KEY = "a-key-of-some-length"


def message(**changes: Any) -> dict[str, Any]:
    return {**CHAT, "messages": [{"role": "user", "content": "Hi", **changes}]}


BAD: dict[str, tuple[str, Any, int, str]] = {
    "nothing": ("chat/completions", b"", 400, "not JSON"),
    "half": ("chat/completions", b'{"model": "talker", "mess', 400, "not JSON"),
    "two": ("chat/completions", b'{"messages": [{"role": "user"}]}{}', 400, "not JSON"),
    "a list": ("chat/completions", b"[]", 400, "Expected `object`"),
    "NaN": ("completions", b'{"prompt": "a", "temperature": NaN}', 400, "not JSON"),
    "infinity": ("completions", b'{"prompt": "a", "temperature": 1e999}', 400, "out of range"),
    "huge number": ("completions", b'{"prompt": "a", "n": 1' + b"0" * 5000 + b"}", 400, ""),
    "not UTF-8": ("completions", b'{"prompt": "\xff\xfe"}', 400, "utf-8"),
    "half a surrogate pair": ("completions", b'{"prompt": "\\ud800"}', 400, ""),
    "deep": ("chat/completions", DEEP, 400, "nested too deeply"),
    "deep, unknown key": ("chat/completions", DEEP.replace(b"tools", b"whatever"), 400, ""),
    "misspelled": ("chat/completions", {**CHAT, "temprature": 1}, 400, "unrecognized request argument: temprature"),
    "no messages": ("chat/completions", {"model": "talker"}, 400, "messages"),
    "empty messages": ("chat/completions", {**CHAT, "messages": []}, 400, "messages: Expected `array` of length >= 1"),
    "a role": ("chat/completions", message(role="king"), 400, r"messages\[0\].role"),
    "content of a number": ("chat/completions", message(content=5), 400, r"messages\[0\].content"),
    "no content": ("chat/completions", message(content=None), 400, "must be a text"),
    "an image": ("chat/completions", message(content=[{"type": "image_url"}]), 400, "reads text, not 'image_url'"),
    "many messages": ("chat/completions", {**CHAT, "messages": CHAT["messages"] * 1025}, 400, "1024 messages"),  # type: ignore[operator]
    "no chat template": ("chat/completions", {**CHAT, "model": "plain"}, 400, "no chat template"),
    "template's own names": ("chat/completions", {**CHAT, "chat_template_kwargs": {"messages": []}}, 400, "cannot set"),
    "other model": ("chat/completions", {**CHAT, "model": "gpt-5"}, 404, "there are: talker, plain, encoder"),
    "no model": ("chat/completions", {"messages": CHAT["messages"]}, 400, "name a model"),
    "an encoder": ("chat/completions", {**CHAT, "model": "encoder"}, 400, "gives embeddings"),
    "a decoder": ("embeddings", {**VECTOR, "model": "plain"}, 400, "gives no embeddings"),
    "hot": ("chat/completions", {**CHAT, "temperature": -1}, 400, "temperature: Expected `float` >= 0.0"),
    "a text for a number": ("chat/completions", {**CHAT, "temperature": "1"}, 400, "temperature: Expected `float"),
    "truth for a number": ("chat/completions", {**CHAT, "n": True}, 400, "n: Expected `int"),
    "top_p": ("chat/completions", {**CHAT, "top_p": 0}, 400, "top_p: Expected `float` > 0"),
    "n": ("chat/completions", {**CHAT, "n": 17}, 400, "more than the 16"),
    "n 0": ("chat/completions", {**CHAT, "n": 0}, 400, "n: Expected `int` >= 1"),
    "prompts": ("completions", {**TEXT, "prompt": ["a"] * 17}, 400, "more than the 16"),
    "max_tokens": ("chat/completions", {**CHAT, "max_tokens": 0}, 400, "at least 1"),
    "too many tokens": ("chat/completions", {**CHAT, "max_tokens": 640}, 400, "maximum context length is 640"),
    "seven stops": ("chat/completions", {**CHAT, "stop": ["a"] * 7}, 400, "may be 4 stop strings"),
    "empty stop": ("chat/completions", {**CHAT, "stop": ""}, 400, "stop: Expected `str` of length >= 1"),
    "bias key": ("chat/completions", {**CHAT, "logit_bias": {"the": 1}}, 400, "token ids as keys"),
    "bias value": ("chat/completions", {**CHAT, "logit_bias": {"1": 101}}, 400, "Expected `float` <= 100"),
    "bias token": ("chat/completions", {**CHAT, "logit_bias": {"999": 1}}, 400, "vocabulary ends at 319"),
    "bias size": ("chat/completions", {**CHAT, "logit_bias": {str(i): 1 for i in range(1025)}}, 400, "1024 entries"),
    "top_logprobs alone": ("chat/completions", {**CHAT, "top_logprobs": 3}, 400, "needs logprobs: true"),
    "top_logprobs": ("chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 21}, 400, "Expected `int` <= 20"),
    "schema": ("chat/completions", {**CHAT, "response_format": {"type": "json_schema"}}, 400, ""),
    "format": ("chat/completions", {**CHAT, "response_format": {"type": "xml"}}, 400, "response_format.type"),
    "bad schema": (
        "chat/completions",
        {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "king"}}}},
        400,
        "",
    ),
    "tools without a notation": ("chat/completions", {**CHAT, "model": "plain", "tools": [TOOL]}, 400, "no notation"),
    "a tool that is not there": (
        "chat/completions",
        {**CHAT, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        400,
        "names 'g', which is not among the tools",
    ),
    "a choice without tools": ("chat/completions", {**CHAT, "tool_choice": "required"}, 400, "there are no tools"),
    "many tools": ("chat/completions", {**CHAT, "tools": [TOOL] * 129}, 400, "128 tools"),
    "broken arguments": (
        "chat/completions",
        message(role="assistant", tool_calls=[{"id": "a", "function": {"name": "f", "arguments": "{"}}]),
        400,
        "arguments of a call are not JSON",
    ),
    "empty prompt": ("completions", {**TEXT, "prompt": ""}, 400, "prompt: Expected `str` of length >= 1"),
    "no prompts": ("completions", {**TEXT, "prompt": []}, 400, "prompt: Expected `array` of length >= 1"),
    "mixed prompts": ("completions", {**TEXT, "prompt": ["a", 1]}, 400, "mixes"),
    "token": ("completions", {**TEXT, "prompt": [1, 320]}, 400, "outside 0 … 319"),
    "huge token": ("completions", {**TEXT, "prompt": [2**70]}, 400, "outside 0 … 319"),
    "long prompt": ("completions", {**TEXT, "prompt": "sea " * 400}, 400, "maximum context length is 640"),
    "long ids": ("completions", {**TEXT, "prompt": [5] * 700}, 400, "context"),
    "a million tokens": ("completions", {**TEXT, "prompt": "a " * 10**6}, 400, "maximum context length is 640"),
    "a million, chat": ("chat/completions", message(content="a " * 10**6), 400, "maximum context length is 640"),
    "nothing wanted": ("completions", {**TEXT, "max_tokens": 0, "echo": True}, 400, "max_tokens 0 needs logprobs"),
    "nothing at all": ("completions", {**TEXT, "max_tokens": 0}, 400, "max_tokens must be at least 1"),
    "suffix": ("completions", {**TEXT, "suffix": "end"}, 400, "suffix is not here"),
    "best_of": ("completions", {**TEXT, "best_of": 3}, 400, "best_of must equal n"),
    "dimensions": ("embeddings", {**VECTOR, "dimensions": 5}, 400, "gives 32 dimensions"),
    "empty text": ("embeddings", {**VECTOR, "input": ""}, 400, "input: Expected `str` of length >= 1"),
    "no texts": ("embeddings", {**VECTOR, "input": []}, 400, "input: Expected `array` of length >= 1"),
    "many texts": ("embeddings", {**VECTOR, "input": ["a"] * 2049}, 400, "2048 texts"),
    "long text": ("embeddings", {**VECTOR, "input": "sea " * 700}, 400, "maximum context length is 640"),
    "encoding": ("embeddings", {**VECTOR, "encoding_format": "hex"}, 400, "encoding_format"),
    "a prompt's name": ("embeddings", {**VECTOR, "prompt_name": "query"}, 400, "no prompt named 'query'"),
    "documents": ("rerank", {"query": "sea", "documents": []}, 400, "documents: Expected `array` of length >= 1"),
    "an empty document": ("rerank", {**RANK, "documents": ["a", ""]}, 400, "document 2 is empty"),
    "many documents": ("rerank", {**RANK, "documents": ["a"] * 2049}, 400, "2048 documents"),
    "a long document": ("rerank", {**RANK, "documents": ["sea " * 700]}, 400, "maximum context length is 640"),
    "a long pair": ("rerank", {**RANK, "query": "sea " * 160, "documents": ["sea " * 160]}, 400, "max_tokens_per_doc"),
    "top_n": ("rerank", {**RANK, "top_n": 0}, 400, "top_n"),
    "not a ranker": ("rerank", {**RANK, "model": "encoder"}, 400, "'encoder' does not rank documents"),
    "a ranker asked for text": ("completions", {**TEXT, "model": "ranker"}, 400, "gives scores, not text"),
    "ids of texts": ("embeddings", {**VECTOR, "input": [[320]]}, 400, "outside 0 … 319"),
}  # fmt: skip


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(depth):
        found = {"a": found}
    return found


def with_tool(parameters: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**CHAT, "tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}], **changes}


SHAPES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "tool": with_tool,
    "forced tool": lambda value: with_tool(value, tool_choice="required"),
    "variables": lambda value: {**CHAT, "chat_template_kwargs": {"a": value}},
    "schema": lambda value: {
        **CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}
    },
    "arguments": lambda value: message(
        role="assistant", tool_calls=[{"id": "a", "function": {"name": "f", "arguments": json.dumps(value)}}]
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_deep_values_are_refused_at_every_depth(server: Running, shape: str) -> None:
    for depth in (120, 200, 400, 600, 800, 900):
        found = server.post("chat/completions", SHAPES[shape](nested(depth)))
        assert found.status_code == 400 and "too deep" in found.json()["error"]["message"], (depth, found.text)


@pytest.mark.parametrize("name", ["self", "messages", "tools", "add_generation_prompt", "variables", "source", "m", ""])
def test_a_templates_variables_may_be_called_anything(server: Running, name: str) -> None:
    found = server.post("chat/completions", {**CHAT, "chat_template_kwargs": {name: 1}})
    assert found.status_code in (200, 400), found.text


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies_are_refused_in_words(server: Running, name: str) -> None:
    path, body, status, words = BAD[name]
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    for streamed in (False, True):
        if streamed and isinstance(body, dict) and path not in ("embeddings", "rerank"):
            data = json.dumps({**body, "stream": True}).encode()
        found = server.post(path, content=data, headers={"content-type": "application/json"})
        assert found.status_code == status, found.text
        error = found.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["type"] != "server_error"
        assert re.search(words, error["message"]), error["message"]
        assert len(error["message"]) < 1100
    assert server.busy() == 0


def test_what_holds_without_a_body(server: Running) -> None:
    def error(method: str, path: str, **options: Any) -> tuple[int, str]:
        found = server.client.request(method, f"{server.url}{path}", **options)
        return found.status_code, found.json()["error"]["message"]

    assert error("GET", "/v1/nothing") == (404, "there is nothing here; /openapi.json lists what there is")
    assert error("GET", "/v1/chat/completions") == (405, "use POST here")
    assert error("POST", "/v1/models", data={"a": "b"}) == (405, "use GET, HEAD here")
    assert error("POST", "/v1/chat/completions", data={"a": "b"})[0] == 415
    assert error("POST", "/v1/completions", json=TEXT, headers={"content-encoding": "gzip"})[0] == 415
    assert error("GET", "/health", headers={"host": "evil.example"})[0] == 403
    assert error("GET", "/health", headers={"host": "127.0.0.1.evil.example:80"})[0] == 403
    assert error("POST", "/v1/completions", json=TEXT, headers={"origin": "http://evil.example"})[0] == 403
    assert error("POST", "/v1/completions", json=TEXT, headers={"origin": "null"})[0] == 403
    for host in ("localhost", "localhost:1", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
        assert server.client.get(f"{server.url}/health", headers={"host": host}).json() == {"status": "ok"}
    same = server.client.post(f"{server.v1}/completions", json=TEXT, headers={"origin": server.url})
    assert same.status_code == 200 and same.headers["x-request-id"].startswith("req_")


def test_bodies_are_limited_whether_or_not_they_say_their_length(folders: dict[str, Path]) -> None:
    with running([folders["plain"]], max_body=1000) as server:
        body = json.dumps({**TEXT, "prompt": "a" * 2000}).encode()

        def chunks() -> Iterator[bytes]:
            for start in range(0, len(body), 100):
                yield body[start : start + 100]

        for content in (body, chunks()):
            found = server.post("completions", content=content, headers={"content-type": "application/json"})
            assert found.status_code == 413 and "1000 bytes" in found.json()["error"]["message"]
        # A length that is a lie: what comes is read, and no more.
        where = urlsplit(server.url).netloc
        connection = http.client.HTTPConnection(where, timeout=10)
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("content-type", "application/json")
        connection.putheader("content-length", "9" * 30)
        connection.endheaders()
        assert connection.getresponse().status in (400, 413)
        connection.close()


def test_a_body_that_never_comes(folders: dict[str, Path]) -> None:
    with running([folders["plain"]], body_s=0.2) as server:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("content-type", "application/json")
        connection.putheader("content-length", "10")
        connection.endheaders()
        assert connection.getresponse().status == 408
        connection.close()


def _answer(connection: socket.socket) -> bytes:
    """A whole answer: its head, and as many bytes after it as the head says."""
    found = b""
    while b"\r\n\r\n" not in found:
        part = connection.recv(10_000)
        assert part, found
        found += part
    head, body = found.split(b"\r\n\r\n", 1)
    size = int(re.search(rb"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]
    while len(body) < size:
        body += connection.recv(10_000)
    return head + b"\r\n\r\n" + body


REFUSED_UNREAD = {
    "no key": ("POST", "/v1/completions", "", 401),
    "a stranger's page": ("POST", "/v1/completions", "origin: http://evil.example\r\n", 403),
    "not JSON": ("POST", "/v1/completions", f"authorization: Bearer {KEY}\r\n", 415),
    "no such place": ("POST", "/v1/nothing", f"authorization: Bearer {KEY}\r\n", 404),
    "no such method": ("PUT", "/v1/completions", f"authorization: Bearer {KEY}\r\n", 405),
    "a body nobody asked for": ("GET", "/health", "", 200),
}


def test_a_connection_ends_where_its_body_was_not_read(folders: dict[str, Path]) -> None:
    with running([folders["plain"]], keys=(KEY,)) as server:
        where = urlsplit(server.url)
        for method, path, header, status in REFUSED_UNREAD.values():
            for length in ("content-length: 1000000000", "transfer-encoding: chunked"):
                head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n{header}{length}\r\n\r\n"
                with socket.create_connection((where.hostname, where.port), timeout=3) as connection:
                    connection.sendall(head.encode())
                    found = _answer(connection)
                    assert found.startswith(f"HTTP/1.1 {status}".encode()), found
                    assert b"connection: close" in found.lower()
                    with contextlib.suppress(ConnectionError):  # it may have closed already
                        connection.sendall(b"5")
                        assert connection.recv(100) == b""


def test_what_is_not_http_is_refused_in_the_same_form(server: Running) -> None:
    where = urlsplit(server.url)
    with socket.create_connection((where.hostname, where.port), timeout=10) as connection:
        connection.sendall(b"GET / SPDY\r\n\r\n")
        found = _answer(connection)
        assert found.startswith(b"HTTP/1.1 400") and b'"not_http"' in found and connection.recv(100) == b""


def test_a_head_that_never_ends(folders: dict[str, Path]) -> None:
    with running([folders["plain"]], head_s=1.0) as server:
        where = urlsplit(server.url)

        def connect() -> socket.socket:
            return socket.create_connection((where.hostname, where.port), timeout=10)

        with connect() as second, connect() as slow, connect() as silent:
            second.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert _answer(second).startswith(b"HTTP/1.1 200")
            for line in (b"POST /v1/completions HTTP/1.1\r\n", b"host: localhost\r\n"):
                slow.sendall(line)
                second.sendall(line)  # of a further request on a connection that has had one
                time.sleep(0.1)
            assert silent.recv(100) == b""
            for connection in (slow, second):
                found = _answer(connection)
                assert found.startswith(b"HTTP/1.1 408") and b'"head_too_slow"' in found and connection.recv(100) == b""
            with connect() as kept:  # between requests there is no head to wait for
                for pause in (1.2, 0.0):
                    kept.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
                    assert _answer(kept).startswith(b"HTTP/1.1 200")
                    time.sleep(pause)


def test_keys(folders: dict[str, Path]) -> None:
    with running([folders["talker"]], keys=("another-key-too", KEY)) as server:
        paths = ("/v1/models", "/v1/stats", "/ready", "/metrics", "/openapi.json", "/nothing")

        def status(path: str, key: str | None, method: str = "GET", **options: Any) -> int:
            headers = {} if key is None else {"authorization": key}
            return server.client.request(method, f"{server.url}{path}", headers=headers, **options).status_code

        wrong = (None, "", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY, f"Basic {KEY}")
        for key in wrong:
            assert [status(path, key) for path in paths] == [401] * len(paths), key
            assert status("/v1/chat/completions", key, "POST", json=CHAT) == 401
            assert status("/health", key) == 200
        good = f"Bearer {KEY}"
        assert [status(path, good) for path in paths] == [200] * 5 + [404]
        assert status("/v1/chat/completions", good, "POST", json=CHAT) == 200
        found = server.client.get(f"{server.v1}/models", headers={"authorization": "Bearer caf\u00e9".encode()})
        assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
        assert found.headers["www-authenticate"] == "Bearer"


def test_an_answer_that_takes_too_long(folders: dict[str, Path]) -> None:
    with running([folders["plain"]], request_s=0.05) as server:
        long = {**TEXT, "max_tokens": 600, "ignore_eos": True}
        found = server.post("completions", long)
        assert found.status_code == 504 and found.headers["x-should-retry"] == "false"
        streamed = server.post("completions", {**long, "stream": True})
        assert streamed.status_code == 200 and '"code":"timeout"' in streamed.text and "[DONE]" not in streamed.text


def test_a_request_begins_with_its_head(folders: dict[str, Path]) -> None:
    with running([folders["plain"]], request_s=0.5) as server:

        def slowly() -> Iterator[bytes]:
            yield b'{"prompt": "Hi", "max_tokens": 1'
            time.sleep(0.6)
            yield b"}"

        found = server.post("completions", content=slowly(), headers={"content-type": "application/json"})
        assert found.status_code == 504


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the server has logged of requests."""
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("roundexport")]
    return [line for line in lines if "/v1/" in line]


def test_the_log_has_no_text(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        server.post("completions", {**TEXT, "prompt": "a very secret prompt"})
        server.post("completions", {**TEXT, "prompt": "a very secret prompt", "n": 0})
        server.post("chat/completions", {**message(content="a very secret prompt"), "stream": True})
        end = time.monotonic() + 10  # a line is written once its answer has been sent, which the client may see first
        while len(lines := ours(caplog)) < 3 and time.monotonic() < end:
            time.sleep(0.01)
    assert len(lines) == 3
    assert "secret" not in "".join(record.getMessage() for record in caplog.records if "roundexport" in record.name)
