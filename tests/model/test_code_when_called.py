"""Graphs get their code when they are called: none is written before, and what runs then is the graph as it is."""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch
from torch import fx

from roundexport.model._patches import code_when_called


class PlusThree(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 3


def test_code_is_written_for_the_graph_that_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    module, two, written = fx.symbolic_trace(PlusThree()), torch.tensor(2), []
    write = fx.Graph.python_code

    def noted(self: fx.Graph, *args: Any, **options: Any) -> Any:
        written.append(self)
        return write(self, *args, **options)

    monkeypatch.setattr(fx.Graph, "python_code", noted)
    recompile = fx.GraphModule.recompile
    with code_when_called():
        for node in module.graph.nodes:
            if node.target is operator.add:
                node.target = operator.mul
        module.recompile()
        twin = copy.deepcopy(module)
        fresh = fx.GraphModule(module, module.graph)
        assert not written and module(two) == 6  # also while it lasts
        module.recompile()
        assert "x * 3" in module.code
    assert fx.GraphModule.recompile is recompile and isinstance(fx.GraphModule.code, property)
    assert twin(two) == fresh(two) == twin(two) == 6
    assert len(written) == 4
