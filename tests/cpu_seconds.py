"""``pytest --cpu-seconds``: what each folder, the dearest files and the dearest tests cost, in CPU seconds.

    cost of a test   user + system time of its process and of the children that it has waited for, setup to teardown,
                     with that of the processes that warm_python.py started for it

Wall clock says little on a machine that does other things beside; CPU seconds repeat within some percent.  A fixture
that is shared is paid by the first test of each process that asks for it; imports are paid by the collection, which
every process does.  Children that nobody waits for (daemons of Ray, the process that forks others) are not counted.

    python -m pytest -n 2 --dist loadfile --cpu-seconds
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest
from warm_python import WarmProcess

_FILES, _TESTS = 30, 40  # lines that are shown


def _used() -> float:
    """CPU seconds of this process, of its children and of what it had forked elsewhere."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in both) + WarmProcess.cpu_seconds


class CpuSeconds:
    """Notes what every phase of a test used on its report, which travels from xdist's workers, and adds it up."""

    def __init__(self) -> None:
        self._last = _used()
        self._by_test: Counter[str] = Counter()

    def pytest_collection_finish(self) -> None:
        """What was used before the first test is the collection's."""
        self._last = _used()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, Any, Any]:
        """Everything since the last phase ended is this one's."""
        report = yield
        now = _used()
        report.cpu_seconds, self._last = now - self._last, now
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Add up; in the process that shows the summary."""
        self._by_test[report.nodeid] += getattr(report, "cpu_seconds", 0.0)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Folders, files and tests, the dearest first."""
        files: Counter[str] = Counter()
        folders: Counter[str] = Counter()
        for test, seconds in self._by_test.items():
            file = test.partition("::")[0]
            files[file] += seconds
            folders[file.rpartition("/")[0]] += seconds
        terminalreporter.section("CPU seconds")
        terminalreporter.line(f"{sum(folders.values()):8.1f} in tests, without imports and collection")
        for costs, most in ((folders, None), (files, _FILES), (self._by_test, _TESTS)):
            terminalreporter.line("")
            for name, seconds in costs.most_common(most):
                terminalreporter.line(f"{seconds:8.1f} {name}")
