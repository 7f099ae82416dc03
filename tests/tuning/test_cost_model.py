"""Estimates: what goes into them, and in what words they come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from roundexport.algorithms.interface import BlockSize
from roundexport.algorithms.rounding import gram, optimal_rtn, rtn, signround
from roundexport.model.block_call import BlockCall
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.streamed_model import StreamedModel
from roundexport.tuning import cost_model
from roundexport.tuning.cost_model import Estimate, Work, estimate


def test_work_is_what_methods_say_and_the_hidden_states(models: Callable[[str], Path]) -> None:
    weights = StreamedModel(Checkpoint.open(models("llama")))
    count = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    with weights.block(0) as block:
        size = BlockSize.of(block, 10, 32)
    plain, alone = optimal_rtn.OptimalRtnSettings(), signround.SignRoundSettings(steps=5, batch_size=4)
    assert Work.of([plain], size, 1) == Work(10, plain.rtn_equivalents(), plain.peak_floats(size))
    both = Work.of([plain, alone], size)
    assert both.forward_passes == alone.forward_passes(10) + 20
    assert both.rtn_equivalents == plain.rtn_equivalents() + alone.rtn_equivalents()
    assert (size.weights, size.outputs, size.widest, size.hidden) == (count, 2 * 64 + 2 * 32 + 2 * 128 + 64, 128, 64)
    assert both.peak_floats == alone.peak_floats(size) > 8 * count


def test_an_estimate_adds_reading_forwards_and_roundings(monkeypatch: pytest.MonkeyPatch) -> None:
    block = nn.ModuleDict({"linear": nn.Linear(8, 4)})
    monkeypatch.setattr(cost_model, "_timed", lambda _: 2.0)
    call = BlockCall((), {}, hidden_by_name=False)
    block.forward = lambda hidden: hidden  # type: ignore[method-assign]
    found = estimate(block, Work(10, 3, 0), 5, 0.5, 64, (call, torch.zeros(4, 2, 8)))
    # a rounding takes 2 s, a forward of one sample 2/4 s; the table is as large as two blocks
    assert found.seconds == 2 * (0.5 + 2) + 5 * (0.5 + 3 * 2 + 10 * 0.5)
    assert found.bytes >= cost_model.peak_bytes()


def test_memory_counts_what_a_method_holds() -> None:
    block = nn.ModuleDict({"linear": nn.Linear(8, 4)})
    little, much = (estimate(block, Work(0, 0, values), 1, 0.0, 0, None).bytes for values in (0, 1 << 34))
    assert little < 2**36 < much


def test_words_say_what_helps_where_memory_is_short() -> None:
    found = Estimate(100.0, 3.0 * 2**30)
    assert found.describe() == found.describe(3.5) == "about 2 min and 3.0 GiB"
    assert found.describe(2.5) == (
        "about 2 min and 3.0 GiB, more than max_ram 2.5; a smaller batch_size or sample_len takes less"
    )
    assert [cost_model.duration(seconds) for seconds in (89, 91, 5399, 5401)] == ["89 s", "2 min", "90 min", "1.5 h"]


@pytest.mark.parametrize(
    "method", [rtn.RtnSettings(), optimal_rtn.OptimalRtnSettings(), signround.SignRoundSettings(), gram.GramSettings()]
)
def test_methods_say_what_they_hold(method: object) -> None:
    one, two = (method.peak_floats(BlockSize(weights, 100, 64, 64, 8, 16)) for weights in (1 << 30, 1 << 31))  # type: ignore[attr-defined]
    assert 0 < one < two
