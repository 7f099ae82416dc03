"""Rows shared out to threads: for compiled loops that let go of the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

Result = TypeVar("Result")


def in_threads(work: Callable[[int, int], Result], rows: int) -> list[Result]:
    """Call ``work(first, last)`` for ranges that cover ``rows``, on as many threads as torch uses."""
    import torch

    threads = max(1, min(torch.get_num_threads(), rows))
    if threads == 1:
        return [work(0, rows)]
    ranges = list(pairwise(rows * part // threads for part in range(threads + 1)))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda ends: work(*ends), ranges))
