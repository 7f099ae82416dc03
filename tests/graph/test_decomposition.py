"""A program decomposed operator by operator is what torch makes of it as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from captured_reference import Reference
from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _decomp, _registration

from roundexport.errors import UnsupportedError
from roundexport.graph.capture import capture
from roundexport.graph.decomposition import QuickProgram, decomposed
from roundexport.model.checkpoint import Checkpoint

# torch's own, of itself, wherever it copies a program
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


@functools.cache
def openvino_table() -> Any:
    table = torch.export.default_decompositions()
    for operator in ops_to_not_decompose():
        table.pop(operator, None)
    return table


@functools.cache
def onnx_table() -> Any:
    known = set(_decomp.get_onnx_implemented_overloads(_registration.ONNXRegistry.from_torchlib()))
    return _decomp.create_onnx_friendly_decomposition_table(known)


TABLES: dict[str, Callable[[], Any]] = {
    "all": functools.cache(torch.export.default_decompositions),  # what each target asks for is a part of it
    "openvino": openvino_table,
    "onnx": onnx_table,
}


def operators(program: ExportedProgram) -> set[Any]:
    return {node.target for node in program.graph.nodes if node.op == "call_function"}


@torch.no_grad()
@pytest.mark.parametrize("family, table", [("gemma3, one block", "all"), ("gpt2, one block", "onnx"),
                                           ("bert, one block", "openvino")])  # fmt: skip
def test_it_is_what_torch_makes_of_it(family: str, table: str, models: Callable[[str], Path]) -> None:
    checkpoint, wanted = Checkpoint.open(models(family)), TABLES[table]()
    got = capture(checkpoint)
    found, expected = decomposed(got.program, wanted), ExportedProgram.run_decompositions(got.program, wanted)
    assert operators(found) <= operators(expected)
    assert operators(found) != operators(got.program)  # there was something to do
    assert len(found.graph.nodes) <= len(expected.graph.nodes) + 2
    ids = torch.arange(4, 64).view(3, 20)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(20).expand(3, 20),
             "token_type_ids": torch.zeros_like(ids)}  # fmt: skip
    answers = [
        Reference(replace(got, program=program), checkpoint).run(*(given[name] for name in got.inputs))
        for program in (found, expected)
    ]
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-5)


class Writes(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        before = y + 5
        y.add_(before)
        return torch.nn.functional.mish(y) + before


class WritesToOneOfSeveral(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        largest, _ = torch.topk(x * 2, 2)
        largest /= largest.sum(-1, keepdim=True)
        return torch.nn.functional.mish(largest)


class WritesToAView(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        first, _ = y.split(2, -1)
        first /= 2
        return torch.nn.functional.mish(y)


class WritesWhatIsSeen(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y[0].add_(1)
        return torch.nn.functional.mish(y)


class WritesToItsInput(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(1).exp() * x


class WritesInAnotherDtype(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 2).half().add_(x) * 1


@pytest.mark.parametrize(
    ("made", "quick"),
    [(Writes, True), (WritesToOneOfSeveral, True), (WritesToAView, False), (WritesWhatIsSeen, False),
     (WritesToItsInput, False), (WritesInAnotherDtype, False)],
)  # fmt: skip
def test_what_is_written_is_seen_by_all_that_come_after(made: type[torch.nn.Module], quick: bool) -> None:
    x = torch.randn(3, 4)
    program = torch.export.export(made(), (x.clone(),))
    for name in ("all", "onnx"):  # the second spells operators that write out as well
        with nullcontext() if quick else pytest.raises(Exception, match="writes"):
            got = decomposed(program, TABLES[name]())
            torch.testing.assert_close(got.module()(x.clone()), made()(x.clone()))
    found = QuickProgram.of(program).run_decompositions()
    torch.testing.assert_close(found.module()(x.clone()), made()(x.clone()))
    assert not any(str(one).partition(".")[2].partition(".")[0].endswith("_") for one in operators(found))
    assert torch.ops.aten.mish.default not in operators(found)


def test_a_number_of_elements_is_the_product_of_sizes() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.mish(x)

    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Model(), (torch.randn(5, 3, 4),), dynamic_shapes=(dynamic,))
    found = decomposed(program, {torch.ops.aten.mish.default: lambda x: x / x.numel()})
    assert not any("sym_numel" in str(one) for one in operators(found))
    x = torch.randn(7, 3, 2)
    torch.testing.assert_close(found.module()(x), x / 42)


class Padded(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, [0, 1]).flatten(1)


def free_sizes() -> ExportedProgram:
    free = torch.export.Dim.DYNAMIC
    return torch.export.export(Padded(), (torch.ones(2, 5, 3),), dynamic_shapes=({0: free, 1: free},), strict=False)


def test_sizes_stay_free_where_a_composite_asks_for_them() -> None:
    found = QuickProgram.of(free_sizes()).run_decompositions(openvino_table())
    assert found.module()(torch.ones(4, 7, 3)).shape == (4, 28)


def test_sizes_that_a_decomposition_fixes_are_an_error() -> None:
    def fixed(x: torch.Tensor, pads: list[int], mode: str = "constant", value: float | None = None) -> torch.Tensor:
        return torch.cat([x, torch.zeros(int(x.shape[0]), *x.shape[1:-1], 1)], -1)

    with pytest.raises(UnsupportedError, match=r"sizes of the example for the only ones: .* = 2"):
        QuickProgram.of(free_sizes()).run_decompositions({torch.ops.aten.pad.default: fixed})
