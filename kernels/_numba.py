"""What kernels with loops compiled by numba share: whether they can run, compiling, and rows shared out to threads.

numba keeps compiled code beside the source, or in the user's cache folder, or where NUMBA_CACHE_DIR says; where none
of them can be written, `njit` compiles for this process alone, a few seconds per loop.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, TypeVar

Result = TypeVar("Result")


def available() -> str | None:
    """None when numba is there, which compiled loops need; else the reason."""
    from importlib.util import find_spec

    missing = [name for name in ("torch", "numba") if not find_spec(name)]
    return f"{' and '.join(missing)} not installed; pip install 'roundexport[tune]'" if missing else None


def njit(loop: Callable[..., Any], **options: Any) -> Any:
    """Compile a loop, which lets go of the interpreter's lock and divides as numpy does.

    Args:
        loop: plain Python over arrays.
        options: further options of ``numba.njit``.
    """
    numba = importlib.import_module("numba")
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy", **options)(loop)
    except (RuntimeError, OSError):  # "no locator available": nowhere to keep it
        return numba.njit(nogil=True, cache=False, error_model="numpy", **options)(loop)


def in_threads(work: Callable[[int, int], Result], rows: int) -> list[Result]:
    """Call ``work(first, last)`` for ranges that cover ``rows``, on as many threads as torch uses.

    ``work`` must let go of the interpreter's lock, or the threads only wait for each other.
    """
    import torch

    threads = max(1, min(torch.get_num_threads(), rows))
    if threads == 1:
        return [work(0, rows)]
    ranges = list(pairwise(rows * part // threads for part in range(threads + 1)))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda ends: work(*ends), ranges))
