"""Names that a file gives of other files, and the only way in which they become paths.

A name is relative, with forward slashes, and stays inside its folder.  Links are followed only where they end inside
the folder, or, for a snapshot folder of the Hugging Face cache, in that repository's own blobs.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePosixPath

from roundexport.errors import ArtifactError


def safe_join(folder: Path, name: str) -> Path:
    """The path of a file that a manifest or index names.

    Args:
        folder: the folder that must not be left.
        name: relative name with forward slashes.

    Returns:
        ``folder / name``; it need not exist.

    Raises:
        ArtifactError: absolute, empty, ``.`` or ``..`` parts, backslashes, control characters, or a link out of it.
    """
    if not is_plain_name(name):
        raise ArtifactError(
            f"{folder}: the file name {name!r} is refused; names are relative and stay inside the folder"
        )
    path = folder / name
    root, target = folder.resolve(), path.resolve()
    if root not in target.parents and not (_in_hub_cache(folder) and root.parent.parent / "blobs" == target.parent):
        raise ArtifactError(
            f"{folder}: {name} is a link that leaves the folder, to {target}; put the file itself there"
        )
    return path


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is relative, with forward slashes, and has no part that could lead out of its folder."""
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") for part in parts) and not PurePosixPath(name).is_absolute()
    return plain and "\\" not in name and ":" not in parts[0] and name.isprintable()


class ListedFiles:
    """The files of a folder that its manifest lists; to a reader, others are not there.

    Args:
        folder: the folder.
        names: what the manifest lists; None: a folder without a manifest, such as a model's, of which all is read.
    """

    def __init__(self, folder: Path, names: Collection[str] | None = None) -> None:
        self.folder = folder
        self._names = None if names is None else frozenset(names)

    def find(self, name: str) -> Path | None:
        """The path of a file; None where it is not listed, or not there.

        Raises:
            ArtifactError: the name, or a link of that name, leaves the folder.
        """
        if self._names is not None and name not in self._names:
            return None
        path = safe_join(self.folder, name)
        return path if path.is_file() else None

    def path(self, name: str) -> Path:
        """The path of a file that must be there.

        Raises:
            ArtifactError: it is not listed or not there, or leaves the folder.
        """
        found = self.find(name)
        if found is None:
            listed = self._names is None or name in self._names
            why = "it is missing" if listed else "the manifest does not list it, so nothing vouches for its bytes"
            raise ArtifactError(f"{self.folder}: the file {name} is needed, but {why}")
        return found


def _in_hub_cache(folder: Path) -> bool:
    return folder.resolve().parent.name == "snapshots"
