"""A dry run sees one block of each kind, and refuses what the whole model would be refused for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import build_model
from roundexport.graph.capture import capture
from roundexport.model.checkpoint import Checkpoint

PATTERN = ["sliding_attention", "sliding_attention", "full_attention"] * 2
KINDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "all equal": ("llama", {"num_hidden_layers": 6}, 1),
    "conv1d": ("gpt2", {"n_layer": 5}, 1),
    "two windows": ("gemma3", {"num_hidden_layers": 6, "layer_types": PATTERN}, 2),
    "an encoder": ("bert", {"num_hidden_layers": 4}, 1),
    "a first block without a norm": ("modernbert", {"num_hidden_layers": 6, "global_attn_every_n_layers": 3}, 3),
}


@pytest.mark.parametrize("name", KINDS)
def test_one_block_of_each_kind_stays(name: str, tmp_path: Path) -> None:
    family, changes, kinds = KINDS[name]
    found = capture(Checkpoint.open(build_model(family, tmp_path, **changes)), whole=False)
    assert len(found.attentions) == kinds
    assert len({info.window for info in found.attentions}) == min(kinds, 2)


def test_a_late_block_that_differs_is_kept_with_its_own_values(tmp_path: Path) -> None:
    folder = build_model("qwen3", tmp_path, num_hidden_layers=6, use_sliding_window=True, sliding_window=8,
                         max_window_layers=5)  # fmt: skip
    found = capture(Checkpoint.open(folder), whole=False)
    assert [info.window for info in found.attentions] == [-1, 8]
