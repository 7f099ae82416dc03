"""Small packages for the runtime's tests, each made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import runtime_toys as toys


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("toys")

    def get(kind: str) -> Path:
        build, options = {**toys.KINDS, **toys.WITH_STATES}[kind]
        return root / kind if (root / kind).exists() else build(root / kind, **options)

    return get
