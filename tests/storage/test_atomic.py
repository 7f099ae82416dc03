"""Atomic folders and files, and names that stay inside their folder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from roundexport.errors import ArtifactError, RoundexportError, UsageError, WontFitError
from roundexport.storage import checksums
from roundexport.storage.atomic import replace_file, write_folder
from roundexport.storage.checksums import check_files, file_entry, read_manifest
from roundexport.storage.locks import writing
from roundexport.storage.paths import is_plain_name, safe_join


def test_a_folder_appears_complete_with_its_parents(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with write_folder(out) as folder:
        assert folder.parent == out.parent
        (folder / "sub").mkdir()
        (folder / "sub" / "f").write_text("x")
        assert not out.exists()
    assert (out / "sub" / "f").read_text() == "x"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_after_an_error_nothing_is_left(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), write_folder(tmp_path / "new" / "out") as folder:
        (folder / "f").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("file", "link"):
        with (
            pytest.raises(UsageError, match="exists already; remove it or name another"),
            write_folder(tmp_path / name),
        ):
            pass
    with pytest.raises(UsageError, match="is not a folder"), write_folder(tmp_path / "file" / "out"):
        pass
    assert (tmp_path / "file").read_text() == "x"


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="appeared while it was being written"),
        write_folder(tmp_path / "out") as folder,
    ):
        (folder / "f").write_text("ours")
        (tmp_path / "out").mkdir()
    assert list((tmp_path / "out").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(WontFitError, match=r"the disk is full: could not write .*out \(\d+ MiB free at ") as caught:
        with write_folder(tmp_path / "out") as folder:
            (folder / "f").write_text("x")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "exit_code", "advice"),
    [
        (errno.EFBIG, 4, "larger than the file system or `ulimit -f` allows"),
        (errno.EMFILE, 4, "too many files open; raise the limit"),
        (errno.ENFILE, 4, "the system has too many files open"),
        (errno.EROFS, 2, "the file system is read-only"),
        (errno.EACCES, 2, "permission is denied"),
        (errno.ENAMETOOLONG, 2, "choose a shorter one"),
    ],
    ids=lambda value: errno.errorcode.get(value) if isinstance(value, int) and value > 4 else None,
)
def test_what_the_system_refuses_comes_with_the_final_name_and_what_to_do(
    code: int, exit_code: int, advice: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(RoundexportError, match=rf"could not write {out}/f: .*{advice}") as caught:
        with write_folder(out) as folder:
            raise OSError(code, os.strerror(code), str(folder / "f"))
    assert caught.value.exit_code == exit_code and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("code", "why"), [(errno.EROFS, "read-only; write elsewhere"), (errno.ENOSPC, "disk is full")])
def test_a_lock_that_cannot_be_made_says_why(
    code: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Any, *_: Any, **__: Any) -> int:
        raise OSError(code, os.strerror(code), str(path))

    with monkeypatch.context() as patched, pytest.raises(RoundexportError, match=f"{tmp_path / 'out'}.*{why}|{why}"):
        patched.setattr(os, "open", refuse)
        with writing(tmp_path / "out"):
            pytest.fail("written without the right to")


def test_a_full_disk_behind_another_error_is_recognized(tmp_path: Path) -> None:
    with pytest.raises(WontFitError, match="the disk is full"), write_folder(tmp_path / "out"):
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        except OSError as error:
            raise RuntimeError("saving failed") from error


def test_a_full_disk_while_syncing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WontFitError), write_folder(tmp_path / "out") as folder:
        (folder / "f").write_text("x")
    with pytest.raises(WontFitError):
        replace_file(tmp_path / "file", b"x")
    assert list(tmp_path.iterdir()) == []


LOCK = ".out.roundexport-lock"
_HOLD = """
import os, sys, time
from pathlib import Path
from roundexport.storage.atomic import write_folder
with write_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_run_is_cleaned_up_by_the_next_and_a_living_one_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(out)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(UsageError, match="is being written by another run"), write_folder(out):
            pass
        assert sorted(path.name for path in tmp_path.iterdir()) == [f".out.partial-{process.pid}", LOCK]
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / f".out.partial-{process.pid}" / "half").exists()
    with write_folder(out) as folder:
        assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name, LOCK]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


_FORK = _HOLD.replace('print("ready", flush=True)', "os.fork() or print(os.getpid(), flush=True)")


def test_a_child_that_outlives_a_killed_run_does_not_hold_its_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", _FORK, str(out)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            with pytest.raises(UsageError, match="is being written by another run"), write_folder(out):
                pass  # the child closing its descriptor has not unlocked the parent's
            process.kill()
            process.wait()
            os.kill(child, 0)  # is alive
            with write_folder(out):
                pass
        finally:
            os.kill(child, signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_same_target_twice_at_once_is_refused(tmp_path: Path) -> None:
    with write_folder(tmp_path / "out"):
        with pytest.raises(UsageError, match="is being written by another run"), write_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out").is_dir()


def test_a_stale_folder_with_this_process_id_is_removed(tmp_path: Path) -> None:
    stale = tmp_path / f".out.partial-{os.getpid()}"  # in containers process ids come again
    stale.mkdir()
    (stale / "old").write_text("x")
    with write_folder(tmp_path / "out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []


def test_replacing_a_file_keeps_the_old_one_until_it_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    replace_file(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


PLAIN = ["a", "a.json", "1_Pooling/config.json", "a b", "ä", ".hidden", "a/..b"]
OUTSIDE = [
    "", ".", "..", "../a", "a/../b", "/etc/passwd", "a//b", "a/", "./a", "a\\b", "..\\a", "C:", "C:/a", "a\0b", "a\nb",
    "\ud800", "a/./b",
]  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_plain_names_are_joined(name: str, tmp_path: Path) -> None:
    assert is_plain_name(name)
    assert safe_join(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_could_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    assert not is_plain_name(name)
    with pytest.raises(ArtifactError, match="is refused; names are relative and stay inside the folder"):
        safe_join(tmp_path, name)


def test_links_inside_are_followed_and_links_outside_refused(tmp_path: Path) -> None:
    folder, secret = tmp_path / "folder", tmp_path / "secret"
    folder.mkdir()
    secret.write_text("s")
    (folder / "real").write_text("x")
    (folder / "inside").symlink_to("real")
    (folder / "outside").symlink_to(secret)
    (folder / "up").symlink_to("..")
    (folder / "chain").symlink_to("outside")
    assert safe_join(folder, "inside").read_text() == "x"
    for name in ("outside", "up/secret", "chain", "up"):
        with pytest.raises(ArtifactError, match=f"{name} is a link that leaves the folder"):
            safe_join(folder, name)


def test_a_folder_reached_through_a_link_is_fine(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "f").write_text("x")
    (tmp_path / "link").symlink_to("real")
    assert safe_join(tmp_path / "link", "f").read_text() == "x"


def test_links_of_the_hugging_face_cache_end_in_its_blobs(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "abc", tmp_path / "models--o--n" / "blobs"
    (snapshot / "sub").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("x")
    (tmp_path / "secret").write_text("s")
    (snapshot / "f").symlink_to("../../blobs/123")
    (snapshot / "sub" / "f").symlink_to("../../../blobs/123")
    (snapshot / "g").symlink_to("../../../secret")
    (blobs / "456").symlink_to("../../secret")
    (snapshot / "h").symlink_to("../../blobs/456")
    assert safe_join(snapshot, "f").read_text() == "x"
    assert safe_join(snapshot, "sub/f").read_text() == "x"
    for name in ("g", "h"):
        with pytest.raises(ArtifactError, match="leaves the folder"):
            safe_join(snapshot, name)


def test_files_are_held_against_their_entries(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    entry = file_entry(tmp_path / "f")
    assert entry == {"sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "size": 3}
    check_files(tmp_path, {"f": entry})
    (tmp_path / "f").write_bytes(b"abd")
    check_files(tmp_path, {"f": entry}, check_hashes=False)
    with pytest.raises(ArtifactError, match="f is damaged or was changed"):
        check_files(tmp_path, {"f": entry})
    (tmp_path / "f").write_bytes(b"ab")
    with pytest.raises(ArtifactError, match="f has 2 bytes, the manifest says 3"):
        check_files(tmp_path, {"f": entry}, check_hashes=False)
    (tmp_path / "f").unlink()
    for make in (lambda: None, (tmp_path / "f").mkdir):
        make()
        with pytest.raises(ArtifactError, match="the file f is missing"):
            check_files(tmp_path, {"f": entry})


def test_an_absurdly_large_manifest_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "MAX_MANIFEST_BYTES", 10)
    (tmp_path / "m").write_bytes(b"x" * 11)
    with pytest.raises(ArtifactError, match="has 11 bytes; more than 10 are not read"):
        read_manifest(tmp_path, "m", "a package")
    with pytest.raises(ArtifactError, match="is not a package, or was left unfinished: it has no other"):
        read_manifest(tmp_path, "other", "a package")
