"""The cache of tensors: what was put is what comes back, damage counts as absence, and old entries make room."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock, Timeout

from roundexport.storage.tensor_cache import TensorCache, key_of

VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROUNDEXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "things"


def test_what_was_put_comes_back() -> None:
    cache = TensorCache("things")
    key = key_of(model="a", seed=1)
    assert cache.get(key) is None and key != key_of(model="a", seed=2)
    cache.put(key, {"x": ("F32", VALUES), "n": ("I64", np.array(3))})
    found = cache.get(key)
    assert found is not None and int(found["n"]) == 3
    np.testing.assert_array_equal(found["x"], VALUES)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_entry_counts_as_absent(damage: str, folder: Path) -> None:
    cache = TensorCache("things")
    cache.put("k", {"x": ("F32", VALUES)})
    path = folder / "k.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
    path.write_bytes({"flip": data, "cut": data[:-4], "empty": b""}[damage])
    assert cache.get("k") is None


def test_what_was_used_longest_ago_makes_room(folder: Path) -> None:
    TensorCache("things").put("old", {"x": ("F32", VALUES)})
    cache = TensorCache("things", max_bytes=(folder / "old.safetensors").stat().st_size * 5 // 2)
    cache.put("used", {"x": ("F32", VALUES)})
    for age, key in enumerate(("used", "old")):
        os.utime(folder / f"{key}.safetensors", (age, age))
    assert cache.get("used") is not None, "and now it was used last"
    cache.put("new", {"x": ("F32", VALUES)})
    assert cache.get("old") is None and cache.get("used") is not None and cache.get("new") is not None
    cache.put("huge", {"x": ("F32", np.zeros(1000, np.float32))})
    assert cache.get("huge") is None


def test_one_process_at_a_time_is_in_with_the_same_key(folder: Path) -> None:
    with TensorCache("things").alone("a"), TensorCache("things").alone("b"), pytest.raises(Timeout):
        FileLock(folder / "a.lock", timeout=0).acquire()
    with FileLock(folder / "a.lock", timeout=0):
        pass


def test_a_cache_that_cannot_be_written_fails_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ROUNDEXPORT_CACHE", str(tmp_path / "file"))
    cache = TensorCache("things")
    cache.put("k", {"x": ("F32", VALUES)})
    with cache.alone("k"):
        assert cache.get("k") is None
    assert (tmp_path / "file").read_text() == "not a folder"


def test_who_waits_for_another_process_says_so(folder: Path) -> None:
    said: list[str] = []

    @contextmanager
    def waiting() -> Iterator[None]:
        said.append("begun")
        other.release()
        yield
        said.append("over")

    folder.mkdir(parents=True)
    other = FileLock(folder / "a.lock")
    with TensorCache("things").alone("a", waiting):
        assert not said, "nobody else is in there"
    other.acquire()
    with TensorCache("things").alone("a", waiting):
        assert said == ["begun", "over"]
        with pytest.raises(Timeout):
            other.acquire(timeout=0)
    other.acquire(timeout=0)
    other.release()
