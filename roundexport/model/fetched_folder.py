"""A model folder in an object store, fetched once: s3://bucket/model, gs://…, whatever fsspec has a client for.

    URL ─ names, sizes and etags of its files ─ key ─ <cache>/fetched/<key>, whole from the moment it is there

A file that changed in the store changes the key, so that the folder is fetched anew.  Several processes at once: one
fetches, the others wait.  Pickles are left where they are, as from the hub.  Weights are mapped from the copy, as from
any folder; workers of a cluster find it where the cache is on a file system that all of them mount (ROUNDEXPORT_CACHE).
Out of scope: writing to a store; artifacts and packages are folders.
"""

from __future__ import annotations

import hashlib
import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from roundexport.errors import CheckpointError
from roundexport.progress import Progress
from roundexport.storage.user_cache import cached_folder

_URL = re.compile(r"[a-z][a-z0-9+.-]*://.+")
_TELLING = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created")  # what tells a file from its earlier self


def is_url(model: str | Path) -> bool:
    """Whether a model is named by the URL of a store."""
    return bool(_URL.fullmatch(str(model)))


def fetch(url: str, patterns: list[str], progress: bool | Progress = False) -> Path:
    """The folder behind a URL, here.

    Args:
        url: of a folder.
        patterns: names of files that are wanted.
        progress: report on stderr, or where to report.

    Raises:
        CheckpointError: no client for it is installed, or there is no such folder, or it cannot be read.
        WontFitError: the disk is full.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise CheckpointError(f"{url}: to fetch it, pip install 'roundexport[stores]'") from error
    try:
        store, root = url_to_fs(url)
        listed: list[dict[str, Any]] = [entry for entry in store.ls(root, detail=True) if entry["type"] == "file"]
        named = {str(entry["name"]).rpartition("/")[2]: entry for entry in listed}
        wanted = {name: own for name, own in sorted(named.items()) if any(fnmatch(name, kind) for kind in patterns)}
        if "config.json" not in wanted:
            raise CheckpointError(f"{url} holds no config.json; give the URL of a model's folder")
        told = [[name, own["size"], *(str(own[key]) for key in _TELLING if key in own)] for name, own in wanted.items()]
        key = hashlib.sha256(json.dumps([url, told]).encode()).hexdigest()[:32]

        def fill(folder: Path) -> None:
            size = sum(int(own["size"]) for own in wanted.values())
            with Progress.of(progress) as shown, shown.stage(f"fetching {url}, {size / 2**30:.2f} GiB") as stage:
                for number, (name, own) in enumerate(wanted.items()):
                    stage.at(number / len(wanted), name)
                    store.get_file(own["name"], str(folder / name))

        return cached_folder("fetched", key, fill)
    except (OSError, ValueError, ImportError) as error:  # of the store, of an unknown protocol, of a client
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{url} cannot be fetched: {reason}") from error
