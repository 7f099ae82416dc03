"""Fixtures of the targets' tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from openvino_tools import Package


@pytest.fixture(scope="session")
def openvino_packages(packages: Callable[[str, str], tuple[Path, Path]]) -> Callable[[str], Package]:
    """``openvino_packages("llama")``: artifact and package of the session, its graph compiled once in this process."""
    from openvino_tools import Package

    opened: dict[str, Package] = {}

    def get(family: str) -> Package:
        if family not in opened:
            opened[family] = Package.opened(*packages(family, "openvino"))
        return opened[family]

    return get
