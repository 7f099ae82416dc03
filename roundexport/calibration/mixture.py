"""What ``--calibration`` names: one source, or several with the share of the samples that each gives.

    a.txt                            one source, whatever its name
    a.txt:0.75,owner/name:0.25       parts; only a comma behind a share parts them, so that a name may hold commas
    self:0.5,chat.jsonl:0.5          text that the model writes is a part like any other
    auto                             what is best without knowing more, see chosen.py

A path that exists is that path, even where it reads like a mixture.  Every part gives its share of the samples, by
largest remainder, and they are interleaved: a run that takes only the first of them sees the same shares.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roundexport.errors import UsageError
from roundexport.storage.checksums import sha256_file
from roundexport.storage.tensor_cache import key_of

from .records import SUFFIXES
from .text import text_digest

SELF = "self"
AUTO = "auto"
"""The default; what it stands for depends on the model, see chosen.py."""
BUNDLED = Path(__file__).with_name("bundled.txt")
"""Novels, of which ``auto`` takes a part."""
_PART = re.compile(r"(.+?):([+-]?\d*\.?\d+)(?:,|$)")
_OFF = 0.01  # shares may miss 1 by so much, as thirds do


@dataclass(frozen=True)
class Part:
    """A source and its share of the samples."""

    source: str
    share: float


def parts_of(named: str) -> tuple[Part, ...]:
    """The sources that are named; a single one has the share 1.

    Raises:
        UsageError: shares that are not above 0 or do not sum to 1, a part without one, or a part named twice.
    """
    if os.path.exists(named) or not _is_mixture(named):  # unlike Path.exists it takes names of any length
        return (Part(named, 1.0),)
    parts, end = [], 0
    for found in _PART.finditer(named):
        parts.append(Part(found[1].strip(), float(found[2])))
        end = found.end()
    told = ", ".join(f"{part.source} with {part.share:g}" for part in parts)
    if end != len(named) or named.endswith(","):
        raise UsageError(
            f"calibration {named!r}: {named[end:]!r} has no share; give every part one, as in a.txt:0.75,b.txt:0.25"
        )
    if wrong := [part for part in parts if not part.share > 0]:
        raise UsageError(f"calibration {named!r}: the share of {wrong[0].source} is {wrong[0].share:g}; it must be > 0")
    total = sum(part.share for part in parts)
    if abs(total - 1) > _OFF + 1e-9:
        raise UsageError(
            f"calibration {named!r}: the shares must sum to 1, and sum to {total:g}: {told}; every part needs one, and "
            "a comma or a colon that belongs to a file's name may be read as the end of a part: rename such a file"
        )
    names = [part.source for part in parts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"calibration {named!r}: {twice[0]} is named twice; add its shares up")
    return tuple(parts)


def _is_mixture(named: str) -> bool:
    """Whether a name that is no path has shares; ``owner/name:2.0`` is a dataset's configuration."""
    found = _PART.match(named)
    if found is None:
        return False
    return found.end() < len(named) or named.endswith(",") or found[1] == SELF or os.path.exists(found[1])


def counts_of(parts: Sequence[Part], num_samples: int) -> list[int]:
    """Samples of each part, by largest remainder.

    Raises:
        UsageError: a part would get none.
    """
    if len(parts) == 1:
        return [num_samples]
    total = sum(part.share for part in parts)
    exact = [part.share / total * num_samples for part in parts]
    counts = [int(value) for value in exact]
    largest = sorted(range(len(parts)), key=lambda place: counts[place] - exact[place])
    for place in largest[: num_samples - sum(counts)]:
        counts[place] += 1
    if 0 in counts:
        part = parts[counts.index(0)]
        raise UsageError(
            f"calibration: of {num_samples} samples none is left for {part.source}, whose share is {part.share:g}; "
            "give it a larger share, or ask for more samples (--num-samples)"
        )
    return counts


def interleaved(counts: Sequence[int]) -> list[int]:
    """Rows of the parts' samples, one part after the other, in the order in which every part is spread evenly."""
    places, start = [], 0
    for part, count in enumerate(counts):
        places += [((index + 0.5) / count, part, start + index) for index in range(count)]
        start += count
    return [row for _, _, row in sorted(places)]


def own_text_share(named: str) -> float:
    """The share of the samples that the model makes itself."""
    return 0.5 if named == AUTO else sum(part.share for part in parts_of(named) if part.source == SELF)


def in_words(named: str) -> str:
    """What is named, for a reader: sources of a mixture by their last names."""
    parts = parts_of(named)
    if len(parts) == 1:
        return named
    return ", ".join(f"{part.share:.0%} {Path(part.source).name}" for part in parts)


def by_content(named: str) -> Any:
    """What is named as a JSON value, files and folders by their content and how it is read: changed, another request.

    Raises:
        UsageError: a file cannot be read.
    """
    parts = parts_of(named)
    if len(parts) == 1:
        return _content(parts[0].source)
    return [[_content(part.source), part.share] for part in parts]


def anywhere(named: str) -> str:
    """The same with absolute paths, for a process that has another working folder."""
    parts = parts_of(named)
    if len(parts) == 1:
        source = parts[0].source
        return str(Path(source).absolute()) if source not in (SELF, AUTO) and os.path.exists(source) else source
    return ",".join(f"{anywhere(part.source)}:{part.share!r}" for part in parts)


def file_digests(identity: dict[str, Any]) -> set[str]:
    """The sha256 of every file with text, sound or a picture that samples are from, as the manifest tells of them."""
    parts = [identity, *identity.get("parts", [])]
    texts = {part["text_sha256"] for part in parts if "text_sha256" in part}
    return texts.union(*(part.get(name, ()) for part in parts for name in ("sounds_sha256", "pictures_sha256")))


def _content(source: str) -> str:
    path = Path(source)
    if source == AUTO:
        return f"{AUTO} {text_digest(BUNDLED)}"
    if source == SELF or not os.path.exists(source):
        return source
    if not path.is_dir():
        digest = text_digest(path)
        return f"records {digest}" if path.suffix in SUFFIXES else digest  # the same bytes, read otherwise
    try:
        return key_of(files={file.name: sha256_file(file) for file in sorted(path.iterdir()) if file.is_file()})
    except OSError as error:
        raise UsageError(f"calibration {source}: the folder cannot be read: {error}") from error
