"""What every rounding method promises of its numbers, whatever it learns.

    zeros      a group, or a row, of weights that are all 0 is exactly 0 afterwards
    outputs    the block's outputs on the calibration inputs are no further from the float ones than round-to-nearest's

Half a step is promised by round-to-nearest alone: a searched grid clips a few large weights to make the step of the
others finer, and a method that compensates moves a weight to make good what others lost.
"""

from __future__ import annotations

import pytest
import torch
from sign_toys import Block, inputs_of, loss_of, specs

from roundexport import plugins
from roundexport.algorithms.interface import load_rounding
from roundexport.model.blocks import linears, weight_of

METHODS = plugins.names("rounding")
SETTINGS = {"signround": {"steps": 30, "batch_size": 4}, "signroundv2": {"steps": 30, "batch_size": 4}}
POLISHED = {"gram": {"steps": 20, "batch_size": 4}}
SCHEMES = [(8, True), (4, True), (3, False), (2, False)]


def one_sided_and_empty() -> Block:
    """A block with rows and groups of 0, and rows of one sign."""
    block = Block()
    for linear in linears(block).values():
        weight = weight_of(linear)
        weight[1, :16], weight[2], weight[3], weight[4] = 0, 0, weight[3].abs() + 0.05, -weight[4].abs() - 0.05
    return block


@pytest.mark.parametrize(("bits", "symmetric"), SCHEMES)
@pytest.mark.parametrize("name", [*METHODS, "gram, polished"])
def test_zeros_stay_and_outputs_do_not_get_worse(name: str, bits: int, symmetric: bool) -> None:
    kind = name.partition(",")[0]
    block, method, plain = one_sided_and_empty(), load_rounding(kind), load_rounding("rtn")
    inputs, schemes = inputs_of(block), specs(bits, symmetric)
    settings = method.settings(**(POLISHED if "," in name else SETTINGS).get(kind, {}))
    found = method.tune_block(block, inputs, schemes, settings).layers
    for layer in found.values():
        weight = torch.from_numpy(layer.dequantize())
        assert torch.count_nonzero(weight[1, :16]) == torch.count_nonzero(weight[2]) == 0
        assert torch.count_nonzero(weight[1]) > 0
    nearest = plain.tune_block(block, inputs, schemes, plain.settings()).layers
    assert loss_of(block, inputs, found) <= loss_of(block, inputs, nearest) * (1 + 1e-6)
