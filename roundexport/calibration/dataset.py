"""Records of a Hugging Face dataset's training split, streamed: no more of them are fetched than are read.

Needs the `datasets` package.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from roundexport.errors import UsageError

from .records import Record

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")


def dataset_records(source: str) -> Iterator[Record]:
    """Records of a dataset's training split.

    Args:
        source: ``owner/name`` or ``owner/name:config``.

    Raises:
        UsageError: `datasets` is not installed, or the split cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"calibration {source}: install roundexport[datasets] to read Hugging Face datasets"
        ) from error
    name, _, config = source.partition(":")
    try:
        yield from datasets.load_dataset(name, config or None, split="train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:  # what datasets and its HTTP client raise
        raise UsageError(
            f"calibration {source}: the dataset's training split could not be read: {str(error).splitlines()[0]}; "
            "with no network, give a text file or self"
        ) from error
