"""One capture for several packages: inside `captures_kept` what was captured before is not captured again.

Tracing a model takes as long as what a target then makes of it, and the targets of one artifact ask for the very same
program.  A capture is kept under all that it depends on:

    the model's digest (config.json and weights), its side files (pooling, sizes of pictures), task, part
    max_context · pooled (then the folder too, for weights of modules) · names and bytes of the overrides

Targets copy the program before they change it.  Where code of the folder may run nothing is kept: the digest does not
tell that code.  Outside of such a block, and in threads begun in it, nothing is kept either.

Cost: the graph and the small tensors of a capture, some MiB, while the block lasts.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from roundexport.model.checkpoint import Checkpoint

    from .capture import Capture

Overrides = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class _Kept:
    most: int
    by_key: OrderedDict[tuple[object, ...], Capture] = field(default_factory=OrderedDict)


_KEPT: ContextVar[_Kept | None] = ContextVar("kept captures", default=None)


@contextmanager
def captures_kept(most: int = 1) -> Iterator[None]:
    """While it lasts, `capture_once` does not capture again what it captured lately.

    Args:
        most: captures that are kept; inside another such block that keeps more, that one serves.
    """
    outer = _KEPT.get()
    token = _KEPT.set(outer if outer is not None and outer.most > most else _Kept(most))
    try:
        yield
    finally:
        _KEPT.reset(token)


def capture_once(
    checkpoint: Checkpoint,
    overrides: Overrides | None = None,
    max_context: int | None = None,
    whole: bool = True,
    pooled: bool = False,
) -> Capture:
    """What `capture` gives, or gave when it was asked for the same inside this `captures_kept`; not to be changed.

    Args:
        checkpoint: see `capture`, and so the rest.
        overrides: likewise.
        max_context: likewise.
        whole: likewise.
        pooled: likewise.
    """
    from .capture import capture

    kept = _KEPT.get()
    if kept is None or checkpoint.trust_remote_code:
        return capture(checkpoint, overrides, max_context, whole, pooled)
    model = checkpoint.digest, _side_files(checkpoint), checkpoint.folder if pooled else None  # its modules' weights
    key = *model, checkpoint.task, checkpoint.part, max_context, _digest(overrides or {}), whole, pooled
    if key not in kept.by_key:
        kept.by_key[key] = capture(checkpoint, overrides, max_context, whole, pooled)
        while len(kept.by_key) > kept.most:
            kept.by_key.popitem(last=False)
    kept.by_key.move_to_end(key)
    return kept.by_key[key]


def _side_files(checkpoint: Checkpoint) -> str:
    found = hashlib.sha256()
    for path in checkpoint.side_files():
        found.update(f"{path}\n".encode())
        found.update((checkpoint.folder / path).read_bytes())
    return found.hexdigest()


def _digest(overrides: Overrides) -> str:
    found = hashlib.sha256()
    for name, values in sorted(overrides.items()):
        found.update(f"{name} {values.shape}\n".encode())
        found.update(np.ascontiguousarray(values).tobytes())
    return found.hexdigest()
