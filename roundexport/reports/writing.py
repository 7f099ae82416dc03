"""The two files that reports are written to: an HTML file of the user's naming, and a package's README.md.

A README.md that somebody wrote, or changed after roundexport wrote it, is never overwritten: a card ends with the
sha256 of its own text, and only a card whose text still has that hash is replaced.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from roundexport.errors import RoundexportError, UsageError
from roundexport.storage.atomic import replace_file

from .gather import gather
from .model_card import model_card
from .report_page import report_page

CARD = "README.md"
_SEAL = re.compile(r"\n<!-- roundexport model card; sha256 of the text above: ([0-9a-f]{64}) -->\n\Z")


def write_report(
    packages: Sequence[str | Path],
    out: str | Path,
    *,
    bench: Sequence[str | Path] = (),
    artifacts: Sequence[str | Path] = (),
) -> int:
    """Write the report on some packages as one HTML file.

    Args:
        packages: package folders.
        out: the file; replaced where it is one of these reports, or empty.
        bench: records of `bench --json`.
        artifacts: artifacts of the packages, where they are not beside them.

    Returns:
        Bytes written.

    Raises:
        UsageError: nothing to report, a record that cannot be read, or ``out`` is something else.
        ArtifactError: a folder is no package.
    """
    records, timings = gather(packages, bench, artifacts)
    path = Path(out)
    _check_out(path)
    data = report_page(records, timings).encode()
    replace_file(path, data)
    return len(data)


def write_cards(
    packages: Sequence[str | Path], *, bench: Sequence[str | Path] = (), artifacts: Sequence[str | Path] = ()
) -> list[Path]:
    """Write the model card of every package, as README.md in its folder.

    Args:
        packages: package folders.
        bench: records of `bench --json`.
        artifacts: artifacts of the packages, where they are not beside them.

    Returns:
        The files.

    Raises:
        UsageError: a README.md is there that roundexport did not write, or that was changed since; or as of
            :func:`write_report`.
        ArtifactError: a folder is no package.
    """
    records, _ = gather(packages, bench, artifacts)
    for record in records:
        if not is_ours(record.folder / CARD):
            raise UsageError(
                f"{record.folder / CARD} was written or changed by somebody; it is left as it is: move it away to have "
                "a card written"
            )
    for record in records:
        replace_file(record.folder / CARD, sealed(model_card(record)).encode())
    return [record.folder / CARD for record in records]


def card_after_conversion(package: Path) -> str | None:
    """Write a package's card, where that can be done without loss; returns why it was not written.

    Args:
        package: a package that `convert` made and verified.
    """
    try:
        write_cards([package])
    except RoundexportError as error:  # the package is whole without its card
        return f"no model card was written: {error}"
    return None


def is_ours(path: Path) -> bool:
    """Whether a card may be written there: nothing is there, or a card exactly as roundexport wrote it."""
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError):
        return False
    found = _SEAL.search(text)
    return found is not None and hashlib.sha256(text[: found.start()].encode()).hexdigest() == found[1]


def sealed(text: str) -> str:
    """A card with the line at its end by which it is known."""
    text = text.rstrip("\n")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}\n<!-- roundexport model card; sha256 of the text above: {digest} -->\n"


def _check_out(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name the file to write, as in {path / 'report.html'}")
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(4096)
        if start and b"<style>\n:root{color-scheme:light dark;--paper" not in start:
            raise UsageError(f"{path} exists already and is not a report; remove it or name another file")
