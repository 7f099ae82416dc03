"""The identity of files: size and sha256, as manifests list them, and holding a folder against such a list.

Weights are large and asked for often (by tuning, by every export and every verification), so theirs are hashed once per
process and state of the file, in a stage that says how far it is: `hash_files`.  The state is what the file system says
of a file: where it is, its size, and when its data and its entry were changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from roundexport.errors import ArtifactError
from roundexport.progress import Progress

from .paths import safe_join

MAX_MANIFEST_BYTES = 64 << 20
_PIECE = 1 << 20
_State = tuple[Path, int, int, int, int]
_HASHED: dict[_State, str] = {}


class FileEntry(TypedDict):
    """Identity of one file."""

    sha256: str
    size: int


def sha256_file(path: Path, report: Callable[[int], None] = lambda count: None) -> str:
    """Hex sha256 of a file, read in pieces.

    Args:
        path: the file.
        report: called with the bytes of every piece that was read.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_PIECE))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            report(count)
    return digest.hexdigest()


def hash_files(paths: Sequence[Path], doing: str, shown: Progress) -> list[str]:
    """Hex sha256 of files, of each once per process and state of the file.

    Args:
        paths: the files.
        doing: the name of the stage.
        shown: where progress is shown, if anything is left to hash.
    """
    states = [_state(path) for path in paths]
    left = {state: path for state, path in zip(states, paths, strict=True) if state not in _HASHED}
    if left:
        total, done = sum(path.stat().st_size for path in left.values()), 0
        with shown.stage(doing) as stage:

            def report(count: int) -> None:
                nonlocal done
                done += count
                stage.at(done / max(total, 1))

            for state, path in left.items():
                stage.doing(path.name)
                _HASHED[state] = sha256_file(path, report)
    return [_HASHED[state] for state in states]


def _state(path: Path) -> _State:
    """What tells a file from what it was before."""
    found = path.stat()
    return path.resolve(), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def file_entry(path: Path) -> FileEntry:
    """Hash and size of a file, in bytes."""
    return {"sha256": sha256_file(path), "size": path.stat().st_size}


def check_files(folder: Path, files: Mapping[str, FileEntry], check_hashes: bool = True) -> None:
    """Hold the files of a folder against what its manifest says of them; other files are not looked at.

    Raises:
        ArtifactError: a name that leaves the folder, a file that is missing, or of another size or hash.
    """
    paths = {name: safe_join(folder, name) for name in files}  # refuse every bad name before touching any file
    for name, entry in sorted(files.items()):
        path = paths[name]
        if not path.is_file():
            raise ArtifactError(f"{folder}: the file {name} is missing")
        size = path.stat().st_size
        if size != entry["size"]:
            raise ArtifactError(f"{path} has {size} bytes, the manifest says {entry['size']}: incomplete or changed")
        if check_hashes and sha256_file(path) != entry["sha256"]:
            raise ArtifactError(f"{path} is damaged or was changed: its sha256 is not the manifest's; make it again")


def read_manifest(folder: Path, name: str, what: str) -> bytes:
    """The bytes of a folder's manifest.

    Raises:
        ArtifactError: none there, or larger than 64 MiB.
    """
    path = safe_join(folder, name)
    if not path.is_file():
        raise ArtifactError(f"{folder} is not {what}, or was left unfinished: it has no {name}")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{path} has {path.stat().st_size} bytes; more than {MAX_MANIFEST_BYTES} are not read")
    return path.read_bytes()
