"""Two replicas behind Ray Serve, one killed under load: only what was under way there is lost."""

from __future__ import annotations

import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import runtime_toys as toys

from conftest import ROOT

SHORT, LONG = 8, 600


@dataclass
class Reply:
    """One request: when it was sent, who answered, and whether it came to its end."""

    sent: float
    replica: str | None = None
    whole: bool = False
    said: str = ""


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    package = toys.onnx_decoder(tmp_path / "small")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = str(ROOT / "samples" / "serving" / "ray_serve.py")
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, script, str(package), "--port", str(port)],
            stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, "ROUNDEXPORT_API_KEY": ""},
        )  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        while line and "serving 2 replicas" not in line:
            line = process.stdout.readline()
        log.seek(0)
        assert line, log.read()[-4000:]
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        process.stdout.close()
        process.wait(60)


def ask(url: str, tokens: int, kill: bool = False) -> Reply:
    """A streamed answer; ``kill`` ends the process that gives it, once it has begun."""
    reply = Reply(time.monotonic())
    body = {"prompt": "The", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as found:
            reply.replica = found.headers.get("x-replica")
            reply.said = str(found.status_code)
            for line in found.iter_lines():
                if kill and line.startswith("data: "):
                    os.kill(int(found.headers["x-replica"]), signal.SIGKILL)
                    kill = False
                reply.whole = reply.whole or (line == "data: [DONE]" and found.status_code == 200)
    except httpx.HTTPError as error:
        reply.said = repr(error)
    return reply


@pytest.mark.slow
def test_no_request_is_lost_but_those_of_the_replica_that_dies(url: str) -> None:
    assert httpx.get(f"{url}/health", timeout=60).json() == {"status": "ok"}
    before = [ask(url, SHORT) for _ in range(12)]
    assert all(reply.whole for reply in before) and len({reply.replica for reply in before}) == 2
    end = time.monotonic() + 4.0
    with ThreadPoolExecutor(5) as pool:
        victim = pool.submit(ask, url, LONG, True)

        def user() -> list[Reply]:
            found = []
            while time.monotonic() < end:
                found.append(ask(url, SHORT))
            return found

        users = [pool.submit(user) for _ in range(4)]
        dead = victim.result()
        killed = time.monotonic()
        replies = [reply for found in users for reply in found.result()]
    assert not dead.whole and dead.replica is not None
    lost = [reply for reply in replies if not reply.whole]
    assert all(reply.sent < killed and reply.replica in (None, dead.replica) for reply in lost), lost
    assert len(lost) <= 4  # a user has one request under way
    after = [reply for reply in replies if reply.sent > killed]
    assert len(after) > 4 and dead.replica not in {reply.replica for reply in after}


def test_a_wrong_folder_is_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Serve would start replicas again and again, and not say why they end."""
    stand_in = types.ModuleType("ray")
    stand_in.__dict__.update(serve=stand_in, Application=object)
    for name in ("ray", "ray.serve"):  # the real one takes a second to import
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setattr(sys, "argv", ["ray_serve.py", "/no/such/folder"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "samples" / "serving" / "ray_serve.py"), run_name="__main__")
    assert ended.value.code == 2 and "/no/such/folder is not a package" in capsys.readouterr().err
