"""Compiled loops where nothing can be written: no cache, the same result."""

from __future__ import annotations

import pytest

from roundexport.kernels import _numba


def test_without_a_place_for_the_cache_loops_are_compiled_for_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core import caching

    def nowhere(*_: object) -> object:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(caching.FunctionCache, "__init__", nowhere)
    loop = _numba.njit(lambda a, b: a + b)
    assert loop(1, 2) == 3
