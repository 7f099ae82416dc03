"""Python's garbage collection, kept from looking through what stays: it took a sixth of the suite's CPU seconds.

torch, transformers, onnxscript and sympy are a million objects that live as long as the process.  Every full collection
walks over all of them, and there are some in every export, one of which the export itself asks for.

    after the tests are collected, and after a test that    a full collection, then what is left is set aside
    imported much                                           (`gc.freeze`): no later collection looks at it
    between two collections of the young                    20,000 new objects instead of 700

Garbage is found before it is set aside, so a file that nobody closed is told all the same.  What was alive then and
becomes garbage in a circle afterwards is never freed: a few toys.
"""

from __future__ import annotations

import gc
import sys

_MUCH = 20  # modules
_YOUNG = 20_000


class SettledGarbage:
    """Sets aside what the process has come to consist of."""

    def __init__(self) -> None:
        self._modules = 0
        gc.set_threshold(_YOUNG, 10, 10)

    def pytest_collection_finish(self) -> None:
        """All test files are imported."""
        self._settle()

    def pytest_runtest_logfinish(self) -> None:
        """A test may have imported an exporter, or the classes of a model."""
        if len(sys.modules) >= self._modules + _MUCH:
            self._settle()

    def _settle(self) -> None:
        gc.collect()
        gc.freeze()
        self._modules = len(sys.modules)
