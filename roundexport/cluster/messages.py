"""Calls to another process as bytes, and their answers.

A function travels by its name, so it must be one of a module; what it is given and gives back can be anything that
pickle takes.  Bytes and not objects are handed to a pool, because torch would put tensors into shared memory of the
sender, which is gone when that dies.  Messages go between processes of one run, over the pool's or Ray's own channels;
no file holds any.
"""

from __future__ import annotations

import pickle  # noqa: TID251  (between processes of one run; no file holds it)
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def call(function: Callable[..., Any], *arguments: Any) -> bytes:
    """A call as a message."""
    return pickle.dumps((function, arguments), pickle.HIGHEST_PROTOCOL)


def answer(message: bytes) -> bytes:
    """Do what a message says; what came out, as a message.  Runs in the worker."""
    function, arguments = pickle.loads(message)  # noqa: S301  (from the driver of this run)
    try:
        found = _Answer(function(*arguments), None)
    except Exception as error:
        error.add_note("".join(traceback.format_exception(error)))  # which does not travel by itself
        found = _Answer(None, error)
    return pickle.dumps(found, pickle.HIGHEST_PROTOCOL)


def result(message: bytes) -> Any:
    """What came out of a call.

    Raises:
        Exception: what the function raised.
    """
    found: _Answer = pickle.loads(message)  # noqa: S301  (from a worker of this run)
    if found.error is not None:
        raise found.error
    return found.value


@dataclass(frozen=True)
class _Answer:
    """What a function gave or raised."""

    value: Any
    error: Exception | None
