"""Text of a Hugging Face dataset's training split: records joined by blank lines.

The column is the first there is of text, content, document.  Records are streamed, and no more of them than are needed.
Needs the `datasets` package.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from roundexport.errors import UsageError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
_TEXT_COLUMNS = ("text", "content", "document")


def dataset_text(source: str, enough: int) -> str:
    """Text of a dataset's training split.

    Args:
        source: ``owner/name`` or ``owner/name:config``.
        enough: characters wanted.

    Raises:
        UsageError: `datasets` is not installed, or the split cannot be read or holds no text.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"calibration {source}: install roundexport[datasets] to read Hugging Face datasets"
        ) from error
    name, _, config = source.partition(":")
    try:
        records = datasets.load_dataset(name, config or None, split="train", streaming=True)
        return "\n\n".join(_texts(source, records, enough))
    except (OSError, ValueError, RuntimeError) as error:  # what datasets and its HTTP client raise
        raise UsageError(
            f"calibration {source}: the dataset's training split could not be read: {str(error).splitlines()[0]}; "
            "with no network, give a text file or self"
        ) from error


def _texts(source: str, records: Any, enough: int) -> Iterator[str]:
    total = 0
    for record in islice(records, enough):
        column = next((name for name in _TEXT_COLUMNS if isinstance(record.get(name), str)), None)
        if column is None:
            raise UsageError(
                f"calibration {source}: its records have the columns {', '.join(record)}; "
                f"one of {', '.join(_TEXT_COLUMNS)} is needed"
            )
        yield record[column]
        total += len(record[column])
        if total >= enough:
            return
