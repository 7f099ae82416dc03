"""`hooks`: forward hooks that are removed when a block of code ends, however it ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """While it lasts, hooks are registered; they are removed at the end.

    Args:
        handles: what ``register_forward_hook`` and its like returned.
    """
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()
