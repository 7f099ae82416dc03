"""Disk that work will take is said before it begins, and refused where less is free."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import roundexport
from roundexport.environment.disk import check_disk
from roundexport.environment.memory import GIB
from roundexport.errors import WontFitError


def test_what_is_written_is_told_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=GIB if folder == tmp_path else 0))
    out, parts = tmp_path / "not" / "there", {"one": GIB, "another": GIB / 2}
    said = check_disk(out, "the work", parts, "have more", there=GIB / 2)
    assert said == "about 1.00 GiB of disk (one 1.00, another 0.50)"
    with pytest.raises(WontFitError, match=r"there: the work takes about 1\.50 .* 1\.00 GiB are free; have more$"):
        check_disk(out, "the work", parts, "have more")


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_an_export_is_refused_before_it_begins(
    target: str, packages: Callable[[str, str], tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, _ = packages("llama", "onnx")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(WontFitError, match="the export takes about") as caught:
        roundexport.export(artifact, tmp_path / "out", to=target, progress=False)
    assert ("what waits to be written" in str(caught.value)) == (target == "openvino")
    assert not list(tmp_path.iterdir())
