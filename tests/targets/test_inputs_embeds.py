"""A decoder cut behind its table of tokens gives what the uncut one gives, on both targets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from roundexport import export
from roundexport.errors import ArtifactError, UnsupportedError, UsageError
from roundexport.runtime import Decoder, load
from roundexport.runtime.token_rows import TokenRows
from roundexport.targets.interface import load_target

ROWS = {"onnx": "embed_tokens.onnx", "openvino": "openvino_text_embeddings_model.xml"}


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_vectors_of_tokens_give_what_tokens_give(
    target: str, packages: Callable[[str, str], tuple[Path, Path]], tmp_path: Path
) -> None:
    artifact, whole = packages("llama", target)
    report = export(artifact, tmp_path / "cut", to=target, settings={"inputs_embeds": True}, progress=False)
    assert ROWS[target] in report.files and report.outputs is not None
    assert not report.kept_float
    cut, uncut = load(tmp_path / "cut", precise=True), load(whole, precise=True)
    assert isinstance(cut, Decoder) and isinstance(uncut, Decoder)
    ids = np.arange(12).reshape(2, 6) + 4
    assert np.abs(cut.logits(ids) - uncut.logits(ids)).max() < 1e-4
    assert np.array_equal(cut.greedy([[5, 6, 7]], 4), uncut.greedy([[5, 6, 7]], 4))
    back, wanted = (load_target(target).read_back(folder) for folder in (tmp_path / "cut", whole))
    assert back.keys() == wanted.keys() and all(back[name].equals(wanted[name]) for name in back)
    (tmp_path / "cut" / ROWS[target]).write_bytes(b"")
    with pytest.raises(ArtifactError):
        load(tmp_path / "cut")


def test_a_model_that_is_not_a_decoder_is_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="inputs_embeds are an input of decoders"):
        export(models("bert"), tmp_path / "cut", settings={"inputs_embeds": True}, progress=False)


def test_rows_of_pictures_stand_among_tokens() -> None:
    rows = TokenRows(lambda ids: np.repeat(ids[..., None].astype(np.float32), 2, -1), 10, most=48)
    first, second = np.full((3, 2), -1.0, np.float32), np.full((3, 2), -2.0, np.float32)
    assert rows.add("a", first) == range(10, 13) == rows.add("a", second)
    assert rows.add("b", second) == range(13, 16)
    found = rows(np.array([[4, 12, 13, 9]]))
    assert found[0, :, 0].tolist() == [4, -1, -2, 9]
    assert rows.numbers("a") == range(10, 13)  # looked at last, so the other one goes
    assert rows.add("c", first) == range(16, 19)
    assert rows.numbers("b") is None
    with pytest.raises(UsageError, match="not kept any more"):
        rows(np.array([[13]]))


def test_pictures_that_somebody_holds_stay() -> None:
    rows = TokenRows(lambda ids: np.repeat(ids[..., None].astype(np.float32), 2, -1), 10, most=48)
    one = np.ones((3, 2), np.float32)  # of which two fit
    for key in "ab":
        rows.add(key, one)
    release, again = rows.hold([4, 11, 9]), rows.hold([10, 12])
    for key in "cd":
        rows.add(key, one)
    assert [rows.numbers(key) is not None for key in "abcd"] == [True, False, False, True]
    with pytest.raises(UsageError, match="not kept any more"):
        rows.hold([11, 14])
    release()
    rows(np.array([[10]]))
    again()
    rows.add("e", one)
    assert [rows.numbers(key) is not None for key in "ade"] == [False, True, True]
