"""A folder for packages made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_toys import Toy


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path / "conv")
