"""Round to nearest: rows in pieces, blocks without data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from roundexport.algorithms.rounding import rtn
from roundexport.errors import SpecError
from roundexport.kernels import fake_quant, round_to_nearest
from roundexport.quant.spec import QuantSpec


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_in_pieces_changes_nothing(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(4, 32, symmetric)
    whole = round_to_nearest.run(weight, spec)
    monkeypatch.setattr(round_to_nearest, "CHUNK", 7 * 64)
    assert round_to_nearest.run(weight, spec).equals(whole)
    assert whole.equals(fake_quant.reference(weight.numpy(), spec))


def test_block_is_rounded_and_left_alone() -> None:
    torch.manual_seed(1)
    block = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)).requires_grad_(False)
    before = block[0].weight.clone()
    specs = {"0": QuantSpec(4, 16), "2": QuantSpec(2, 16, False)}
    result = rtn.tune_block(block, None, specs, rtn.RtnSettings())
    assert torch.equal(block[0].weight, before)
    assert list(result.layers) == ["0", "2"] and result.loss_after is None
    assert result.layers["2"].equals(fake_quant.reference(block[2].weight.numpy(), specs["2"]))


def test_more_bits_round_closer() -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    errors = [
        float(np.square(round_to_nearest.run(weight, QuantSpec(bits, 32)).dequantize() - weight.numpy()).mean())
        for bits in (2, 3, 4, 8)
    ]
    # Each bit halves the step, which quarters the squared error; at least a factor of 2.5 with clipping's share.
    assert all(fine * 2.5 < coarse for coarse, fine in itertools.pairwise(errors))


def test_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(SpecError, match="does not divide K=48"):
        round_to_nearest.run(torch.zeros(4, 48), QuantSpec(4, 32))
