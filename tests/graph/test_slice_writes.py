"""Writes into parts of a tensor become operators that give a new one, with the same values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from roundexport.graph.slice_writes import without_writes

ATEN = torch.ops.aten


class Filled(nn.Module):
    """DeepSeek's keys: two parts of an empty tensor, one of them the same for all heads."""

    def forward(self, x: Tensor) -> Tensor:
        whole = x.new_empty(*x.shape[:-1], 6)
        whole[..., :4].copy_(x[..., 1:5])
        whole[..., 4:] = x[:, :1, :, :2]
        return whole * 2


class EveryThird(nn.Module):
    """Qwen3.5's angles: every third place of one row, from the other rows; rows are read before and after."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = x + 1
        first = rows[0]
        before = first * 3
        for other in (1, 2):
            first[..., other:6:3] = rows[other, ..., other:6:3]
        return first + 0, rows * 2, before


class OneNumber(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 0] = 7.0
        y[:, :, 1:2] = y[:, :, :1]
        return y


class PartlyEmpty(nn.Module):
    """What is empty in between is not joined."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        whole = x.new_empty(*x.shape[:-1], 4)
        whole[..., :2] = x[..., :2]
        first = whole[..., :2] + 1
        whole[..., 2:] = x[..., 2:4]
        return whole + 0, first


class SeenOtherwise(nn.Module):
    """A view of other sizes is read after the write: left to torch."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        flat = y.view(-1)
        y[0] = x[1]
        return flat + 1


def exported(module: nn.Module) -> tuple[torch.export.ExportedProgram, Tensor]:
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    dynamic = {"x": {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}}
    return torch.export.export(module, (), {"x": x}, dynamic_shapes=dynamic, strict=False), x


@pytest.mark.parametrize(
    ("module", "operator"),
    [
        (Filled, ATEN.cat.default),
        (EveryThird, ATEN.slice_scatter.default),
        (OneNumber, ATEN.select_scatter.default),
        (PartlyEmpty, ATEN.slice_scatter.default),
    ],
)
def test_values_are_the_same_and_nothing_writes(module: type[nn.Module], operator: object) -> None:
    program, x = exported(module())
    without_writes(program)
    targets = {node.target for node in program.graph.nodes}
    assert ATEN.copy_.default not in targets and operator in targets
    torch.testing.assert_close(program.module()(x=x), module()(x))


def test_an_empty_tensor_that_is_filled_is_one_operator() -> None:
    program, _ = exported(Filled())
    without_writes(program)
    targets = {node.target for node in program.graph.nodes}
    assert not targets & {ATEN.slice_scatter.default, ATEN.new_empty.default}


def test_memory_under_a_name_of_another_kind_is_left_alone() -> None:
    program, x = exported(SeenOtherwise())
    without_writes(program)
    assert any(node.target in (ATEN.copy_.default, ATEN.fill_.Tensor) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x=x), SeenOtherwise()(x))
