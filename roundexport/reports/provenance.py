"""Where a model comes from and under which license, as its source says it; what nobody says stays unknown.

    hub id           is the base model; its README, where the hub's cache has it, says the license
    folder           front matter of its README.md: license, base_model, language; else the first line of its LICENSE
    GGUF file        general.license, general.base_model.0.repo_url, general.source.huggingface.repository
    an earlier card  of the package, where the source is gone

A folder's README that names a base model says what the folder was made from; whether the folder is that model itself
is not known, so no relation is claimed.  ``_name_or_path`` of config.json is not read: a relative folder
(``out/checkpoint-500``) looks just like a hub id.

In: the source's location.  Limits: of a README's front matter only plain scalars and lists of them are understood.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from roundexport.errors import RoundexportError
from roundexport.formats.package import PackageManifest
from roundexport.model.gguf_header import is_gguf, read_header

from .records import Provenance

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CACHED = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")
_KEY = re.compile(r"(?P<key>[A-Za-z_]\w*):(?:\s+(?P<value>.*))?")
_LONGEST = 1 << 20
_LICENSES = (("Apache License", "apache-2.0"), ("MIT License", "mit"))
Fields = dict[str, tuple[str, ...]]


def provenance(package: Path, manifest: PackageManifest) -> Provenance:
    """What is known of a package's source.

    Args:
        package: the package's folder, whose own LICENSE and earlier card count where the source is gone.
        manifest: its manifest.
    """
    location = str(manifest.source["location"])
    path = Path(location)
    if path.is_dir():
        found = _folder(path)
    elif is_gguf(path):
        found = _gguf(path)
    elif _HUB_ID.fullmatch(location) and not path.is_absolute():
        said = _read_card(_hub_readme(location), "its model card")
        found = replace(said, name=location, base_model=location, relation="quantized")
    else:
        found = Provenance(path.name or location)
    earlier = _read_card(package / "README.md", "the package's earlier card")
    if found.license is None:
        taken = {key: getattr(earlier, key) for key in ("license", "license_name", "license_link")}
        found = replace(found, **taken, said_by=found.said_by or earlier.said_by)
    if found.base_model is None:
        found = replace(found, base_model=earlier.base_model, relation=earlier.relation)
    if found.license is None and (license_id := _license_of(package)) is not None:
        found = replace(found, license=license_id, said_by="the LICENSE file")
    return found


def front_matter(text: str) -> Fields:
    """Scalars and lists of scalars of a model card's front matter, by key."""
    lines = text.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    fields: Fields = {}
    key = ""
    for line in lines[1:]:
        if line.strip() == "---":
            return fields
        found = _KEY.fullmatch(line.rstrip())
        if found is not None:
            key, value = found["key"], (found["value"] or "").strip()
            items = value[1:-1].split(",") if value.startswith("[") and value.endswith("]") else [value]
            fields[key] = tuple(filter(None, map(_scalar, items)))
        elif key and line.lstrip().startswith("- ") and ":" not in line.partition("- ")[2].replace("://", ""):
            fields[key] = (*fields[key], *filter(None, [_scalar(line.partition("- ")[2])]))
        elif line.strip() and not line.startswith((" ", "-", "#")):
            key = ""
    return {}  # never closed


def _scalar(text: str) -> str:
    text = text.strip()
    if text[:1] in "\"'" and len(text) > 1 and text.endswith(text[0]):
        return text[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    text = text.partition(" #")[0].strip()
    return "" if text in ("null", "~", "|", ">") else text


def _folder(folder: Path) -> Provenance:
    cached = _CACHED.fullmatch(folder.resolve().parent.parent.name)
    said = _read_card(folder / "README.md", "the source's README.md")
    if said.license is None and (license_id := _license_of(folder)) is not None:
        said = replace(said, license=license_id, said_by="the source's LICENSE")
    if cached is None:
        return replace(said, name=folder.resolve().name)
    hub = f"{cached['owner']}/{cached['name']}"
    return replace(said, name=hub, base_model=hub, relation="quantized")


def _gguf(path: Path) -> Provenance:
    try:
        metadata = read_header(path).metadata
    except RoundexportError:
        return Provenance(path.name)
    url = str(metadata.get("general.base_model.0.repo_url", ""))
    base = str(metadata.get("general.source.huggingface.repository", "")) or url.partition("huggingface.co/")[2]
    license_id = metadata.get("general.license")
    return Provenance(
        path.name,
        license=license_id.lower() if isinstance(license_id, str) and license_id else None,
        license_name=_text(metadata.get("general.license.name")),
        license_link=_text(metadata.get("general.license.link")),
        base_model=base if _HUB_ID.fullmatch(base) else None,
        said_by="the GGUF file's header",
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _read_card(path: Path | None, said_by: str) -> Provenance:
    """What a model card says in its front matter."""
    try:
        if path is None or path.stat().st_size > _LONGEST:
            return Provenance("")
        fields = front_matter(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Provenance("")

    def one(key: str) -> str | None:
        return next(iter(fields.get(key, ())), None)

    base = one("base_model")
    return Provenance(
        "",
        license=one("license"),
        license_name=one("license_name"),
        license_link=one("license_link"),
        base_model=base if base is not None and _HUB_ID.fullmatch(base) else None,
        relation=one("base_model_relation") if said_by.startswith("the package") else None,
        languages=fields.get("language", ()),
        said_by=said_by if one("license") or base else None,
    )


def _hub_readme(hub: str) -> Path | None:
    """README of an id in the hub's cache."""
    home = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub"
    folder = Path(home).expanduser() / f"models--{hub.replace('/', '--')}" / "snapshots"
    found = sorted(folder.glob("*/README.md"), key=lambda path: path.stat().st_mtime) if folder.is_dir() else []
    return found[-1] if found else None


def _license_of(folder: Path) -> str | None:
    """The license whose title a LICENSE file begins with."""
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        try:
            with (folder / name).open(encoding="utf-8") as file:
                start = file.read(200).strip()
        except (OSError, ValueError):
            continue
        for title, license_id in _LICENSES:
            if start.removeprefix("# ").startswith(title) and (license_id == "mit" or "Version 2.0" in start):
                return license_id
    return None
