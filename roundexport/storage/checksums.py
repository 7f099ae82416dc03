"""The identity of files: size and sha256, as manifests list them, and holding a folder against such a list."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from roundexport.errors import ArtifactError

from .paths import safe_join

MAX_MANIFEST_BYTES = 64 << 20


class FileEntry(TypedDict):
    """Identity of one file."""

    sha256: str
    size: int


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
