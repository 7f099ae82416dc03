"""Toy packages behind a real server, for all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import runtime_toys as toys
from server_toys import Running, running, with_chat


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("served")
    return {
        "talker": with_chat(toys.onnx_decoder(root / "talker")),
        "plain": toys.onnx_decoder(root / "plain"),
        "encoder": toys.onnx_encoder(root / "encoder", hidden_size=toys.HIDDEN),
        "ranker": toys.onnx_ranker(root / "ranker"),
    }


@pytest.fixture(scope="session")
def server(folders: dict[str, Path]) -> Iterator[Running]:
    with running(list(folders.values())) as found:
        yield found
