"""Small packages for the runtime's tests, each made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import runtime_toys as toys

from roundexport.runtime import Decoder, load


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("toys")

    def get(kind: str) -> Path:
        build, options = {**toys.KINDS, **toys.WITH_STATES}[kind]
        return root / kind if (root / kind).exists() else build(root / kind, **options)

    return get


@pytest.fixture(scope="module", params=["ort", "ov"])
def decoder(request: pytest.FixtureRequest, toy: Callable[[str], Path]) -> Decoder:
    found = load(toy(request.param), threads=1, precise=True)
    assert isinstance(found, Decoder)
    return found
