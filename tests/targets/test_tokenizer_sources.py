"""One tokenizer for calibration, runtime and the converted OpenVINO tokenizer: that of tokenizer.json, whole prompts.

Rows C3, C4, C5 and C7 of the table of reported trouble: other vocabulary files beside it, flags that take the
post-processor apart, two beginnings of a chat, prompts cut at the tokenizer's own idea of a length.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.processors import TemplateProcessing

from roundexport.calibration.text import encoder_of
from roundexport.model.checkpoint import Checkpoint
from roundexport.runtime.tokenizer import Tokenizer
from roundexport.targets.openvino.clients import write_client_files

TEXT = "In 1998 the houses of the village, 27 in all, were sold for what they had cost. " * 3


@pytest.fixture
def folder(models: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a model whose tokenizer files can be changed."""
    return Path(shutil.copytree(models("llama"), tmp_path / "model"))


def _converted(folder: Path, out: Path, text: str) -> list[int]:
    """Ids from the package's OpenVINO tokenizer."""
    import openvino as ov
    import openvino_tokenizers  # noqa: F401  (registers its operations)

    out.mkdir()
    assert write_client_files(Checkpoint.open(folder), out) == []
    compiled = ov.Core().compile_model(out / "openvino_tokenizer.xml", "CPU")
    ids: list[int] = compiled([text])["input_ids"][0].tolist()
    return ids


def _config(folder: Path, **values: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _framed(folder: Path, before: str, after: str = "") -> None:
    """Let the tokenizer put special tokens around a text."""
    path = str(folder / "tokenizer.json")
    raw = RawTokenizer.from_file(path)
    named = [(name, raw.token_to_id(name)) for name in (before, after) if name]
    raw.post_processor = TemplateProcessing(single=f"{before} $A {after}".strip(), special_tokens=named)
    raw.save(path)


def _assert_all_read_alike(folder: Path, out: Path, expected: list[int]) -> None:
    assert encoder_of(Checkpoint.open(folder))(TEXT, True) == expected
    assert Tokenizer(folder).encode(TEXT) == expected
    assert _converted(folder, out, TEXT) == expected


def test_other_merges_beside_tokenizer_json_change_nothing(folder: Path, tmp_path: Path) -> None:
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(saved["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in saved["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges[4:]) + "\n", encoding="utf-8")
    _config(folder, tokenizer_class="GPT2Tokenizer")
    expected = RawTokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    _assert_all_read_alike(folder, tmp_path / "out", expected)


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False}, {"add_bos_token": False, "add_eos_token": False}])
def test_cls_and_sep_stay_whatever_the_flags_say(folder: Path, tmp_path: Path, flags: dict[str, bool]) -> None:
    _framed(folder, "<cls>", "<sep>")
    _config(folder, cls_token="<cls>", sep_token="<sep>", **flags)
    expected = RawTokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    assert (expected[0], expected[-1]) == (2, 3)
    _assert_all_read_alike(folder, tmp_path / "out", expected)


@pytest.mark.parametrize("where", ["model_max_length", "truncation"])
def test_a_long_prompt_stays_whole(folder: Path, tmp_path: Path, where: str) -> None:
    expected = RawTokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    if where == "truncation":
        raw = RawTokenizer.from_file(str(folder / "tokenizer.json"))
        raw.enable_truncation(16)
        raw.save(str(folder / "tokenizer.json"))
    else:
        _config(folder, model_max_length=16)
    assert len(expected) > 50
    _assert_all_read_alike(folder, tmp_path / "out", expected)


def test_a_chat_begins_once_and_so_does_plain_text(folder: Path) -> None:
    _framed(folder, "<eos>")  # the toy's bos
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode_chat([{"role": "user", "content": "a house"}])
    assert ids[0] == 0 and 0 not in ids[1:]
    plain = tokenizer.encode("a house")
    assert plain[0] == 0 and 0 not in plain[1:]
    assert encoder_of(Checkpoint.open(folder))("a house", True) == plain
