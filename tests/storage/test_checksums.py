"""Hashes of large files: once per state of a file, in a stage that says how far it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from roundexport.progress import Progress, Stage
from roundexport.storage.checksums import hash_files, sha256_file


def test_files_are_hashed_once_and_again_when_they_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shares: list[float] = []
    monkeypatch.setattr(Stage, "at", lambda self, share, detail=None: shares.append(share))
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(b"x" * (3 << 19))
    with Progress() as shown:
        found = hash_files(paths, "hashing weights", shown)
        assert found == [sha256_file(path) for path in paths]
        assert shares == pytest.approx([1 / 3, 1 / 2, 5 / 6, 1])
        assert hash_files(paths, "hashing weights", shown) == found
        assert capsys.readouterr().err.splitlines()[0] == "hashing weights …" and len(shares) == 4
        paths[1].write_bytes(b"y" * (3 << 19))
        assert hash_files(paths, "hashing weights", shown) == [found[0], sha256_file(paths[1])] != found
    assert len(shares) == 6
