"""Layers of a paged graph that share a pool of cache blocks: the same numbers, and only where blocks have one shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runtime_toys as toys

from roundexport.runtime import Decoder, load
from roundexport.runtime.engines import _ov_paged, _ov_pools
from roundexport.runtime.types import Floats

POOLS = {"key_cache.0", "value_cache.0"}


def rewritten(folder: Path) -> Any:
    """A toy's graph after the vendor's rewriting alone."""
    import openvino as ov
    from openvino._offline_transformations import paged_attention_transformation

    model = ov.Core().read_model(folder / "openvino_model.xml")
    paged_attention_transformation(model)
    return model


def caches(model: Any) -> set[str]:
    return {node.any_name for node in model.inputs if "_cache." in node.any_name}


def told(folder: Path) -> list[Floats]:
    """Logits of two rows that grow past a pool, of which one is a fork that writes into a shared block."""
    decoder = load(folder, threads=1, precise=True)
    assert isinstance(decoder, Decoder)
    tokens = np.random.default_rng(0).integers(2, toys.VOCAB, 150).tolist()
    with decoder.start(expected=40) as session:
        [first] = session.add()
        found = [session.extend({first: tokens[:45]}).copy()]
        second = session.fork(first, 40)
        found.append(session.extend({second: tokens[45:150], first: tokens[:1]}).copy())
        found.append(session.extend({second: tokens[:1], first: tokens[1:2]}).copy())
    return found


def test_a_shared_pool_gives_the_numbers_of_pools_apart(
    toy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ov_paged, "_LEAST", 1)  # so that pools grow
    together = told(toy("ov"))
    monkeypatch.setattr(_ov_pools, "_MOST", 1)
    for one, other in zip(together, told(toy("ov")), strict=True):
        np.testing.assert_array_equal(one, other)


def test_layers_with_heads_of_one_form_share_and_their_other_inputs_go(toy: Callable[[str], Path]) -> None:
    model = rewritten(toy("ov"))
    assert len(caches(model)) == 2 * toys.LAYERS
    assert _ov_pools.share_pools(model) == dict.fromkeys(POOLS, toys.LAYERS)
    assert caches(model) == POOLS


def test_layers_with_other_heads_keep_their_pools(toy: Callable[[str], Path]) -> None:
    model = rewritten(toy("ov"))
    last = [node for node in model.get_ordered_ops() if node.get_type_name() == "PagedAttentionExtension"][-1]
    last.get_rt_info()["v_head_size"] = str(2 * toys.HEAD)
    before = caches(model)
    assert _ov_pools.share_pools(model) == dict.fromkeys(before, 1)
    assert caches(model) == before
