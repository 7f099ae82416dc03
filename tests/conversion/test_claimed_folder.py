"""The folder of a conversion: whose it is, and who works in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from roundexport.conversion.asked_targets import Asked
from roundexport.conversion.claimed_folder import claimed, write_result
from roundexport.conversion.settings import ConvertSettings
from roundexport.errors import UsageError
from roundexport.progress import Progress
from roundexport.verification.gates import Gates


def test_two_runs_of_one_request_do_not_work_in_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with claimed(out, {"bits": 4}, None, {}):
        for _ in range(2):
            with (
                pytest.raises(UsageError, match="out is being written by another run"),
                claimed(out, {"bits": 4}, None, {}),
            ):
                pass
        assert (out / "request.json").is_file()
    with pytest.raises(KeyError), claimed(out, {"bits": 4}, None, {}):
        raise KeyError
    assert not out.exists()
    with pytest.raises(KeyError), claimed(tmp_path / "other" / "out", {}, None, {}):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_finished_conversion_is_judged_again_on_another_text_and_by_other_gates(tmp_path: Path) -> None:
    out, asked, text, copy = tmp_path / "out", Asked.of("onnx"), tmp_path / "a.txt", tmp_path / "copy.txt"
    text.write_text("one")
    copy.write_text("one")
    with claimed(out, {}, asked, {}):
        (out / "onnx").mkdir()
    write_result(out, {"quality": {"onnx": {"failures": []}}}, ConvertSettings(asked, text).judges(Progress(False)))
    for same in (text, copy):
        with (
            pytest.raises(UsageError, match="holds a finished conversion of this very request"),
            claimed(out, {}, asked, ConvertSettings(asked, same).judges(Progress(False))),
        ):
            pass
    text.write_text("another")
    for other in (ConvertSettings(asked, text), ConvertSettings(asked), ConvertSettings(asked, copy, Gates(max_kl=1))):
        with claimed(out, {}, asked, other.judges(Progress(False))):
            pass
