"""The user's cache: where it is, made once, by one of several processes, and never half."""

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from roundexport.errors import UsageError
from roundexport.storage import atomic
from roundexport.storage.user_cache import cache_root, cached_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUNDEXPORT_CACHE", str(tmp_path / "cache"))


def test_where_the_cache_is(tmp_path, monkeypatch):
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("ROUNDEXPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "roundexport"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "roundexport"


def test_a_folder_is_made_once(tmp_path):
    made = []

    def fill(folder: Path) -> None:
        made.append(folder)
        (folder / "a").write_text("1")

    assert (
        cached_folder("kind", "key", fill) == cached_folder("kind", "key", fill) == tmp_path / "cache" / "kind" / "key"
    )
    assert len(made) == 1


@pytest.mark.parametrize("error", [ValueError, UsageError])
def test_what_fails_leaves_nothing_and_is_told(tmp_path, error):
    def fill(folder: Path) -> None:
        (folder / "half").write_text("1")
        raise error("no")

    with pytest.raises(error, match="no"):
        cached_folder("kind", "key", fill)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ROUNDEXPORT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="not a folder"):
        cached_folder("kind", "key", lambda folder: None)


def test_what_another_finished_before_the_lock_was_free_is_not_written_again(tmp_path, monkeypatch):
    @contextmanager
    def late(out: Path) -> Iterator[None]:
        out.mkdir()
        yield

    monkeypatch.setattr(atomic, "writing", late)
    found = cached_folder("kind", "key", lambda folder: pytest.fail("written again"))
    assert found.is_dir() and [*found.parent.iterdir()] == [found]


def _write_slowly(folder: Path) -> None:
    (folder.parent.parent / f"writer-{multiprocessing.current_process().pid}").touch()
    time.sleep(0.5)
    (folder / "a").write_text("1")


def _ask(_: int) -> str:
    return (cached_folder("kind", "key", _write_slowly) / "a").read_text()


def test_of_several_processes_one_writes_and_the_others_wait(tmp_path):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(_ask, range(3)) == ["1", "1", "1"]
    assert len(list((tmp_path / "cache").glob("writer-*"))) == 1
