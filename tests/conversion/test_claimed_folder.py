"""The folder of a conversion: whose it is, and who works in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from roundexport.conversion.claimed_folder import claimed
from roundexport.errors import UsageError
from roundexport.verification.gates import Gates


def test_two_runs_of_one_request_do_not_work_in_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with claimed(out, {"bits": 4}, None, Gates()):
        for _ in range(2):
            with (
                pytest.raises(UsageError, match="out is being written by another run"),
                claimed(out, {"bits": 4}, None, Gates()),
            ):
                pass
        assert (out / "request.json").is_file()
    with pytest.raises(KeyError), claimed(out, {"bits": 4}, None, Gates()):
        raise KeyError
    assert not out.exists()
    with pytest.raises(KeyError), claimed(tmp_path / "other" / "out", {}, None, Gates()):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
