"""One package of two: a language model whose graph reads vectors, and the graph that makes vectors of pictures.

    TEXT      embed_tokens, language model, tokenizer, …       ┐
    VISION    vision encoder and projector                     ┴──▶ OUT, in the layout that vendors' pipelines read

OUT's manifest is TEXT's, with VISION's under ``vision`` of its settings (FORMAT.md).  Files are linked, not copied,
where the disk can; integers were proven when the two packages were made, and every byte is the same.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from roundexport.errors import ArtifactError, UsageError
from roundexport.storage.atomic import write_folder
from roundexport.types import EMBEDS

from .package import MANIFEST, SIGHT, VISION, PackageManifest, read_package, write_manifest
from .verification_record import RECORD

_OWN = (MANIFEST, RECORD, "README.md")  # said of one package; not of both together


def join_packages(
    text: Path,
    vision: Path,
    out: Path,
    check: Callable[[Path], Mapping[str, Any] | None],
    complete: Callable[[Path, PackageManifest, PackageManifest], None] | None = None,
) -> PackageManifest:
    """Write a package that reads pictures.

    Args:
        text: package of a language model, made with `inputs_embeds`.
        vision: package of the same model's image side.
        out: the folder to make.
        check: looks at the finished folder before it is kept; what it found is kept in the manifest's settings.
        complete: adds files of other clients, by the manifests of TEXT and VISION, before OUT's lists what there is.

    Raises:
        UsageError: ``out`` exists, or the packages do not go together.
        ArtifactError: one is damaged.
    """
    language, pictures = read_package(text), read_package(vision)
    _check(language, pictures, text, vision)
    with write_folder(out) as folder:
        for source, manifest in ((vision, pictures), (text, language)):
            for name in manifest.files:
                if name not in _OWN:
                    _link(source / name, folder / name)
        described = {key: value for key, value in pictures.to_json().items() if key != "files"}
        joined = replace(language, settings={**language.settings, VISION: {**described, "files": {}}})
        if complete is not None:
            complete(folder, language, pictures)
        written = write_manifest(folder, joined)
        if found := check(folder):
            written = write_manifest(folder, replace(joined, settings={**joined.settings, SIGHT: dict(found)}))
    return written


def _check(language: PackageManifest, pictures: PackageManifest, text: Path, vision: Path) -> None:
    if not language.settings.get(EMBEDS):
        raise UsageError(f"{text}: its graph reads token ids; export it with inputs_embeds to join it with {vision}")
    if pictures.task != "embed_image" or pictures.target != language.target:
        raise UsageError(
            f"{vision}: not the image side of a model for {language.target}; it cannot be joined to {text}"
        )
    # A feature is a vector, or several one behind the other (DeepStack).
    if pictures.hidden_size % language.hidden_size or pictures.source["location"] != language.source["location"]:
        raise UsageError(
            f"{text} and {vision} were made from {language.source['location']} and {pictures.source['location']}, with "
            f"vectors of {language.hidden_size} and {pictures.hidden_size}; parts of one model can be joined"
        )
    same = [name for name in language.files if name in pictures.files and name not in _OWN]
    if wrong := [name for name in same if language.files[name] != pictures.files[name]]:
        raise ArtifactError(f"{wrong[0]} of {text} is not that of {vision}; make both from one model")


def _link(source: Path, target: Path) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
