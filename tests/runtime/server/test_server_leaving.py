"""Clients that leave, queues that are full, servers that stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest
from server_toys import running, until

from roundexport.runtime.batch import Batch
from roundexport.runtime.scheduler import Scheduler
from roundexport.runtime.server.models import DecoderModel
from roundexport.runtime.server.requests import ContentPart

if TYPE_CHECKING:
    from server_toys import Running

LONG: dict[str, Any] = {"model": "plain", "prompt": "The", "max_tokens": 630, "ignore_eos": True}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """An engine that takes its time, and how often it has written a token: a clock that a busy machine slows too."""
    advance, steps = Batch.advance, [0]

    def slowly(self: Batch) -> Any:
        time.sleep(0.01)
        steps[0] += 1
        return advance(self)

    monkeypatch.setattr(Batch, "advance", slowly)
    return lambda: steps[0]


@contextmanager
def asked(server: Running, body: dict[str, Any], path: str = "completions") -> Iterator[socket.socket]:
    """The connection of a client that has asked, and leaves when this ends."""
    where = urlsplit(server.url)
    request = httpx.Request("POST", f"{server.v1}/{path}", json=body)
    head = "".join(f"{k}: {v}\r\n" for k, v in request.headers.items())
    with socket.create_connection((where.hostname, where.port)) as connection:
        connection.sendall(f"POST /v1/{path} HTTP/1.1\r\n{head}\r\n".encode() + request.content)
        yield connection


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_is_cancelled_at_once(
    slow: Callable[[], int], server: Running, streamed: bool, n: int
) -> None:
    with asked(server, {**LONG, "stream": streamed, "n": n}) as connection:
        until(lambda: server.busy() == n)
        if streamed:
            assert connection.recv(1000)
    left = slow()
    until(lambda: server.busy() == 0)
    assert slow() - left < 50  # the answer has 630
    until(lambda: server.service.running == 0)


@pytest.mark.usefixtures("slow")
def test_long_prompts_of_clients_that_leave_are_not_read_to_their_end(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("roundexport.runtime.scheduler.PROMPT_TOKENS", 4)
    with running([folders["plain"]]) as server:
        [model] = server.models
        assert isinstance(model, DecoderModel)
        with asked(server, {**LONG, "prompt": [[seed, *range(2, 300)] for seed in range(2, 10)], "max_tokens": 1}):
            until(lambda: model.scheduler.counts.read > 0)
        until(lambda: server.busy() == 0)
        assert 0 < model.scheduler.counts.read < 400  # of 8 x 299


def test_pictures_of_a_client_that_leaves_are_not_looked_at(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []

    def part(model: object, given: ContentPart, where: str) -> dict[str, Any]:
        looked.append(where)
        time.sleep(0.02)
        return {"type": "text", "text": given.text}

    monkeypatch.setattr("roundexport.runtime.server.messages._part", part)
    content = [{"type": "text", "text": "a"}] * 100
    body = {"model": "talker", "messages": [{"role": "user", "content": content}], "max_tokens": 1}
    with asked(server, body, "chat/completions"):
        until(lambda: bool(looked))
    until(lambda: server.service.running == 0)
    seen = len(looked)
    time.sleep(0.1)
    assert len(looked) <= seen + 1 < 100


@pytest.mark.usefixtures("slow")
def test_a_full_queue_says_429_and_when_to_come_again(folders: dict[str, Path]) -> None:
    with running([folders["plain"]], rows=1, queue=1, max_choices=1) as server, ThreadPoolExecutor(2) as pool:
        with httpx.stream("POST", f"{server.v1}/completions", json={**LONG, "stream": True}) as first:
            pieces = first.iter_bytes()  # kept: without it the response would be closed
            next(pieces)
            waiting = pool.submit(server.post, "completions", {**LONG, "max_tokens": 1})
            until(lambda: server.busy() == 2)
            for streamed in (False, True):
                found = server.post("completions", {**LONG, "stream": streamed})
                assert found.status_code == 429 and int(found.headers["retry-after"]) >= 1
                assert found.json()["error"]["code"] == "queue_full"
        assert waiting.result().status_code == 200


def test_work_before_the_queue_has_places_too(folders: dict[str, Path]) -> None:
    with running([folders["plain"]], rows=1, queue=1, max_choices=1) as server:
        where = urlsplit(server.url)
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        with ExitStack() as stack:
            for _ in range(3):  # their bodies never come
                connection = stack.enter_context(socket.create_connection((where.hostname, where.port)))
                connection.sendall(head + b"content-length: 10\r\n\r\n")
            until(lambda: server.service.posts.total() == 3)
            found = server.post("completions", LONG)
            assert found.status_code == 429 and found.headers["retry-after"] == "1"
            assert server.client.get(f"{server.url}/ready").status_code == 200
        until(lambda: server.service.posts.total() == 0)
        assert server.post("completions", {**LONG, "max_tokens": 1}).status_code == 200


@pytest.mark.usefixtures("slow")
def test_draining_lets_running_answers_finish_and_takes_nothing_new(folders: dict[str, Path]) -> None:
    with running([folders["plain"]]) as server, httpx.Client() as kept:
        assert kept.get(f"{server.url}/ready").status_code == 200
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.post, "completions", {**LONG, "max_tokens": 80})
            until(lambda: server.busy() == 1)
            server.server.drain()
            assert kept.get(f"{server.url}/ready").status_code == 503
            assert kept.get(f"{server.url}/health").status_code == 200
            late = server.post("completions", LONG)
            assert late.status_code == 503 and late.json()["error"]["code"] == "stopping"
            assert answer.result().json()["usage"]["completion_tokens"] == 80


def test_draining_has_an_end(slow: Callable[[], int], folders: dict[str, Path]) -> None:
    with running([folders["plain"]], drain_s=0.2) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, "completions", LONG)
        until(lambda: server.busy() == 1)
        server.stop()
        assert slow() < 400  # the answer has 630
        assert answer.exception() is not None or answer.result().status_code >= 500


def test_an_engine_that_fails_is_a_500_and_the_next_request_is_answered(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text = "a sec" + "ret path"

    def broken(self: Batch) -> None:
        raise RuntimeError(text)

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "advance", broken)
        whole = server.post("completions", LONG)
        streamed = server.post("completions", {**LONG, "stream": True})
    assert whole.status_code == 500 and "secret" not in whole.text
    assert '"code":"internal_error"' in streamed.text and "[DONE]" not in streamed.text
    assert "unexpected RuntimeError" in caplog.text and "secret" not in caplog.text
    assert server.post("completions", {**LONG, "max_tokens": 3}).status_code == 200


def test_prompts_that_find_no_place_leave_no_work_behind(folders: dict[str, Path]) -> None:
    pieces: list[int] = []

    def scored(backend: object, tokens: list[int], alternatives: int) -> Iterator[list[Any]]:
        while True:  # for as long as somebody waits
            pieces.append(tokens[0])
            time.sleep(0.01)
            yield []

    with running([folders["plain"]], queue=2, max_choices=2) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr("roundexport.runtime.server.answers.scored", scored)
        body = {"model": "plain", "max_tokens": 0, "echo": True, "logprobs": 1}
        with asked(server, {**body, "prompt": [[5, 6]]}):
            until(lambda: bool(pieces))
            found = server.post("completions", {**body, "prompt": [[7, 8], [9, 10]]})
            assert found.status_code == 429
        until(lambda: server.busy() == 0)
        assert 9 not in pieces


def test_an_engine_that_has_stopped_is_told(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object, **settings: object) -> None:
        raise MemoryError

    with running([folders["plain"]]) as server:
        monkeypatch.setattr(Scheduler, "_new_batch", broken)
        monkeypatch.setattr(Batch, "advance", broken)
        assert server.post("completions", LONG).status_code == 503
        for path in ("/health", "/ready"):
            found = server.client.get(server.url + path)
            assert found.status_code == 503 and found.json()["error"]["code"] == "engine_stopped"
        assert server.post("completions", LONG).json()["error"]["code"] == "engine_stopped"


def test_the_command_serves_and_ends_on_sigterm(folders: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "roundexport.cli.app", "serve", f"small={folders['plain']}", "--port", "0"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd="/", env={**os.environ, "ROUNDEXPORT_API_KEY": ""}
    )
    assert process.stderr is not None
    limit = threading.Timer(60, process.kill)  # a server that says something else is not waited for
    limit.start()
    with process.stderr:
        said: list[str] = []  # before it, what the engine has to say
        for line in process.stderr:
            said.append(line)
            if line.startswith("serving "):
                break
        assert said and said[-1].startswith("serving small at http://127.0.0.1:"), said
        url = line.partition(" at ")[2].partition(";")[0]
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "Hi", "max_tokens": 2}).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    limit.cancel()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "so a key must be asked for"),
        (["--rows", "0"], "rows must"),
        (["--api-key-file", "/nonexistent"], "key file cannot be read"),
    ],
)
def test_the_command_refuses_nonsense(folders: dict[str, Path], arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "roundexport.cli.app", "serve", str(folders["plain"]), "--port", "0", *arguments]
    found = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd="/", env={**os.environ, "ROUNDEXPORT_API_KEY": ""}
    )
    assert found.returncode == 2 and words in found.stderr


def test_an_address_that_is_taken(server: Running, folders: dict[str, Path]) -> None:
    port = str(urlsplit(server.url).port)
    command = [sys.executable, "-m", "roundexport.cli.app", "serve", str(folders["plain"]), "--port", port]
    found = subprocess.run(command, check=False, capture_output=True, text=True, cwd="/")
    assert found.returncode == 2 and "choose another --port" in found.stderr
