"""What the converters under a target raise comes out as our own error, with the operator named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from roundexport.errors import UnsupportedError
from roundexport.targets.onnx.translate import translate
from roundexport.targets.openvino.graph import Graph
from roundexport.targets.openvino.lowering import lower


class _Bessel(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(input_ids.float())


class _Polar(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.polar(input_ids.float(), input_ids.float()).real


def captured(module: torch.nn.Module) -> Any:
    program = torch.export.export(module, (torch.ones(2, 3, dtype=torch.long),))
    return SimpleNamespace(program=program, inputs=("input_ids",), outputs=("logits",), task="generate")


@pytest.mark.parametrize(("module", "operator"), [(_Bessel(), "bessel_j0"), (_Polar(), r"aten\.polar\.default")])
def test_openvino_names_the_operator(module: torch.nn.Module, operator: str) -> None:
    with pytest.raises(UnsupportedError, match=f"OpenVINO cannot convert .*{operator}"):
        lower(Graph(captured(module), None, "cpu"))  # type: ignore[arg-type]


def test_onnx_names_the_operator() -> None:
    with pytest.raises(UnsupportedError, match=r"ONNX has no form .*bessel_j0"):
        translate(captured(_Bessel()))
