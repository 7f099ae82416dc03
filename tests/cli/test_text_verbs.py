"""`generate` and `chat` on toy packages: what they print, and what they do when told to stop."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import runtime_toys as toys
from cli_tools import SCRIPT, Run

from roundexport.cli import chatting
from roundexport.runtime import GenerationSettings

TEMPLATE = (
    "{% for m in messages %}<pad>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<pad>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "package"
    folder.mkdir()
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return toys.onnx_decoder(folder)


def talk(package: Path, *lines: str, flags: tuple[str, ...] = ()) -> tuple[int, str, str]:
    command = [SCRIPT, "chat", package, "-t", "1", "--max-new-tokens", "12", *flags]
    done = subprocess.run(
        command, input="".join(f"{line}\n" for line in lines), capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_a_chat_through_a_pipe(toy: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    lines = (
        "What did the sea bring?", "And then?", "/stats", "/system Be brief.", "/system", f"/save {saved}",
        f"/save {saved}", "/nonsense", "/help", "//path", "/reset", "/save", "/quit", "never read",
    )  # fmt: skip
    code, out, err = talk(toy, *lines)
    assert code == 0, err
    messages = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[0]["content"] == "Be brief." and messages[3]["content"] == "And then?"
    assert out.startswith(f"{messages[2]['content']}\n{messages[4]['content']}\n")
    read, reused = map(int, re.findall(r"last turn: (\d+) tokens read, (\d+) reused", err)[0])
    assert 0 < read < reused
    assert "all 2: " in err and "system message: Be brief." in err and f"{saved} exists" in err
    assert "not known" in err and "/system TEXT" in err and "needs the name" in err and "Source" not in err


def test_a_message_that_does_not_fit_is_said_and_the_chat_goes_on(toy: Path) -> None:
    code, out, err = talk(toy, "word " * 700, "Hello?", "/stats")
    assert code == 0 and "max_context" in err and "all 1: " in err and out.strip()


def test_a_command_that_cannot_be_done_does_not_end_the_chat(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    bad = (f"/save {tmp_path}/file/x.json", "/save ~nobody-of-that-name/x.json", f"/image {'x' * 300}")
    code, out, err = talk(toy, *bad, "Hello?", f"/save {tmp_path}/new/chat.json", "/stats")
    assert code == 0 and out.strip() and "all 1: " in err and len(err.split("roundexport: ")) == 1 + len(bad)
    assert "file is not a folder" in err and json.loads((tmp_path / "new" / "chat.json").read_text())["messages"]


def test_the_trace_of_what_fails_in_a_chat_comes_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("out of luck")

    chat = chatting._Chat(Path(), SimpleNamespace(ask=broken), GenerationSettings())  # type: ignore[arg-type]
    for asked in ("0", "1"):
        monkeypatch.setenv("ROUNDEXPORT_TRACE", asked)
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello?\n"))
        chat.run()
        err = capsys.readouterr().err
        assert "unexpected ValueError: out of luck" in err and ("in broken" in err) == (asked == "1")


def test_guessing_changes_no_answer_and_is_summed_up(toy: Path) -> None:
    lines = ("the sea and the sea and the sea and the", "the sea and the sea", "/stats")
    plain, looked, drafted = (talk(toy, *lines, flags=flags) for flags in ((), ("--lookup",), ("--draft", str(toy))))
    assert plain[1] == looked[1] == drafted[1]
    assert "guesses kept" in drafted[2] and "guesses kept" not in plain[2]
    both = talk(toy, "Hello?", flags=("--lookup", "--draft", str(toy)))
    assert both[0] == 2 and "choose one" in both[2]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_stops_an_answer_and_not_the_program(toy: Path) -> None:
    command = [SCRIPT, "chat", toy, "-t", "1", "--max-new-tokens", "500", "--ignore-eos", "--temperature", "1"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as chat:
        assert chat.stdin is not None and chat.stdout is not None
        chat.stdin.write(b"What did the sea bring?\n")
        assert chat.stdout.read(1)
        chat.send_signal(signal.SIGINT)
        _, err = chat.communicate(b"And then?\n/stats\n", timeout=120)
    assert chat.returncode == 0 and b"(stopped)" in err and b"all 2: " in err


def test_a_package_without_a_chat_template_cannot_chat(run: Run, tmp_path: Path) -> None:
    code, _, err = run("chat", toys.onnx_decoder(tmp_path / "plain"))
    assert code == 1 and "no chat template" in err


def test_generate_holds_its_answer_to_a_schema_and_tells_log_probabilities(run: Run, toy: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}, '
                      '"required": ["n"], "additionalProperties": false}', encoding="utf-8")  # fmt: skip
    ask = ("generate", toy, "--prompt", "The sea", "-t", "1", "--json")
    code, out, err = run(*ask, "--json-schema", schema, "--logprobs", "2")
    assert code == 0, err
    answer = json.loads(out)
    assert 0 <= json.loads(answer["text"])["n"] <= 9 and answer["finished"] == "stop"
    assert [choice["token"] for choice in answer["choices"]] == answer["tokens"]
    assert all(len(choice["top"]) == 2 and choice["logprob"] <= 0 for choice in answer["choices"])
    code, out, err = run(*ask, "--regex", "[a-z]{3} [0-9]", "-n", "3", "--temperature", "5")
    texts = [answer["text"] for answer in json.loads(out)["answers"]]
    assert len(set(texts)) > 1 and all(re.fullmatch("[a-z]{3} [0-9]", text) for text in texts)
    assert run(*ask, "--regex", "[a", "--temperature", "1")[0] == 2
    assert run(*ask, "--regex", "a", "--json-schema", schema)[0] == 2
    assert run(*ask, "--json-schema", tmp_path / "none.json")[0] == 2


def test_generate_prints_several_answers_and_the_gain(run: Run, toy: Path) -> None:
    ask = ("generate", toy, "--prompt", "the sea the sea the", "--max-new-tokens", "6", "--ignore-eos", "-t", "1")
    code, out, err = run(*ask, "-n", "2")
    first, second = out.split("--- 2 of 2\n")
    assert code == 0 and first == second and re.fullmatch(r"engine ort, 1 thread .*\n", err)  # greedy twins
    code, out, err = run(*ask, "--draft", toy)
    assert code == 0 and out == first and re.search(r"6 tokens in \d runs .* guesses kept", err)
    code, penalized, _ = run(*ask, "--frequency-penalty", "100", "--presence-penalty", "5", "--json")
    tokens = json.loads(penalized)["tokens"]
    assert len(set(tokens)) == len(tokens) == 6


def test_a_draft_with_other_tokens_is_refused(run: Run, toy: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from roundexport.formats.package import read_package, write_manifest

    other = toys.onnx_decoder(tmp_path / "other")
    tokenizer = Tokenizer.from_file(str(other / "tokenizer.json"))
    tokenizer.add_tokens(["one more"])
    manifest = read_package(other)
    tokenizer.save(str(other / "tokenizer.json"))
    write_manifest(other, manifest)
    code, _, err = run("generate", toy, "--prompt", "The sea", "--draft", other)
    assert code == 2 and "other tokens" in err
