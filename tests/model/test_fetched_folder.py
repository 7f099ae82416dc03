"""Models behind URLs of stores: fetched once, again when they changed, and the same model as the folder's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tuning_tools import contents

from conftest import tuned
from roundexport.errors import CheckpointError
from roundexport.model.checkpoint import Checkpoint

fsspec = pytest.importorskip("fsspec")

URL = "memory://store/models/llama"


@pytest.fixture
def store(models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A store in memory that holds a model; and an empty cache."""
    monkeypatch.setenv("ROUNDEXPORT_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.put(f"{models('llama')}/", "/store/models/llama/", recursive=True)
    memory.pipe_file("/store/models/llama/pytorch_model.bin", b"code")
    yield memory
    memory.rm("/store", recursive=True)


def test_a_model_is_fetched_once_and_again_when_it_changed(
    store: Any, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Checkpoint.open(URL, progress=False)
    assert (opened.location, opened.digest) == (URL, Checkpoint.open(models("llama")).digest)
    (kept,) = (tmp_path / "cache" / "fetched").glob("[0-9a-f]*")
    assert not list(kept.glob("*.bin")), "a pickle was fetched"
    with monkeypatch.context() as offline:
        offline.setattr(type(store), "get_file", None)
        assert Checkpoint.open(URL, progress=False).folder == opened.folder
    config = store.cat_file("/store/models/llama/config.json")
    store.pipe_file("/store/models/llama/config.json", config + b"\n")
    assert Checkpoint.open(URL, progress=False).folder != opened.folder


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_an_artifact_of_it_differs_from_the_folders_by_the_place_alone(
    scheme: str, store: Any, models: Callable[[str], Path], tmp_path: Path
) -> None:
    url = URL if scheme == "memory" else models("llama").as_uri()
    plain, found = (
        contents(tuned(model, tmp_path / name, algorithm="rtn", group_size=32))
        for name, model in (("plain", models("llama")), ("found", url))
    )
    assert found["manifest.json"].replace(url.encode(), str(models("llama")).encode()) == plain["manifest.json"]
    assert {**found, "manifest.json": b""} == {**plain, "manifest.json": b""}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nope://bucket/model", "cannot be fetched: Protocol not known: nope"),
        ("memory://nothing/there", "memory://nothing/there cannot be fetched: "),
        ("memory://store/models", "holds no config.json; give the URL of a model's folder"),
    ],
)
def test_what_cannot_be_fetched_is_told(store: Any, url: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(url, progress=False)
