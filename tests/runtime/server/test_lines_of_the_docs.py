"""The lines that README and docs/serving.md tell users to run get their answers from a server."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server_toys import Running, running

from conftest import ROOT
from roundexport.runtime.settings import GenerationSettings

FILES = ("README.md", "roundexport/docs/serving.md")
HERE = "http://127.0.0.1:8000"
LONGEST = 24


@pytest.fixture(scope="module")
def named(folders: dict[str, Path]) -> Iterator[Running]:
    """A server of one package, called as it is there."""
    with running([f"out-onnx={folders['talker']}"], max_tokens=LONGEST) as found:
        yield found


def block(file: str, language: str, word: str) -> str:
    """The code of that language with that word in it."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), re.DOTALL)
    (found,) = [code for code in blocks if word in code]
    assert HERE in found
    return found


def greedy(server: Running, question: str) -> str:
    """The likeliest answer of the package itself."""
    decoder = server.models.decoder("out-onnx").decoder
    ids = decoder.tokenizer.encode_chat([{"role": "user", "content": question}])
    return "".join(step.text[0] for step in decoder.generate([ids], GenerationSettings(max_new_tokens=LONGEST)))


def asked(command: str) -> str:
    """What curl prints; what its request is answered, where there is no curl."""
    if shutil.which("curl"):
        return subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True, timeout=60).stdout
    words = shlex.split(command.replace("\\\n", ""))
    header, data = (words[words.index(flag) + 1] for flag in ("-H", "-d"))
    name, _, value = header.partition(": ")
    return httpx.post(words[1], content=data, headers={name: value}, timeout=60).raise_for_status().text


@pytest.mark.parametrize("file", FILES)
def test_the_lines_of_openais_client(file: str, named: Running, capsys: pytest.CaptureFixture[str]) -> None:
    code = block(file, "python", "from openai import")
    question = re.search(r'"content": "([^"]+)"', code)
    exec(compile(code.replace(HERE, named.url), file, "exec"), {})
    assert question and capsys.readouterr().out.rstrip("\n") == greedy(named, question[1]).rstrip("\n") != ""


@pytest.mark.parametrize("file", FILES)
def test_the_lines_for_curl(file: str, named: Running) -> None:
    command = block(file, "bash", "curl ")
    found = asked(command.replace(HERE, named.url))
    if '"stream": true' in command:
        events = re.findall(r"^data: (.+)$", found, re.MULTILINE)
        assert events[-1] == "[DONE]" and all(json.loads(event)["model"] == "out-onnx" for event in events[:-1])
        assert any(json.loads(event)["choices"][0]["delta"].get("content") for event in events[:-1])
    else:
        question = re.search(r'"content": "([^"]+)"', command)
        assert question and json.loads(found)["choices"][0]["message"]["content"] == greedy(named, question[1])
