"""What vLLM 0.33 asks of a folder, read from its loaders and held against every folder that is written here.

Config keys without which `from_config` fails, bits and symmetry that it has types for, and the parameters that
`create_weights` registers for a linear, with their shapes and dtypes: any other tensor of a layer would be unexpected,
any missing one stay empty.  Fused linears (qkv_proj, gate_up_proj) look for their scheme under their own name.
Source: model_executor/layers/quantization/ of vLLM 0.33: auto_gptq.py, auto_awq.py, inc/inc.py, base_config.py,
compressed_tensors/compressed_tensors.py, schemes/compressed_tensors_wNa16.py, utils/gptq_utils.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_support import write_artifact
from safetensors import safe_open

from roundexport import export
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.targets.interface import ExportReport

Models = Callable[[str], Path]
Shapes = dict[str, tuple[str, list[int]]]
KEYS = {
    "gptq": {"bits", "group_size", "desc_act", "sym"},
    "awq": {"bits", "group_size", "zero_point"},
    "auto_round": {"bits", "group_size", "sym", "packing_format"},
    "compressed-tensors": {"config_groups", "format", "ignore"},
}
DROPPED = {".g_idx"}  # by base_config.py


def _packed_inputs(rows: int, width: int, bits: int, groups: int) -> Shapes:
    return {
        "qweight": ("I32", [width * bits // 32, rows]), "qzeros": ("I32", [groups, rows * bits // 32]),
        "scales": ("F16", [groups, rows]),
    }  # fmt: skip


def _packed_outputs(rows: int, width: int, bits: int, groups: int) -> Shapes:
    return {
        "qweight": ("I32", [width, rows * bits // 32]), "qzeros": ("I32", [groups, rows * bits // 32]),
        "scales": ("F16", [groups, rows]),
    }  # fmt: skip


def _compressed(rows: int, width: int, bits: int, groups: int) -> Shapes:
    return {
        "weight_packed": ("I32", [rows, -(-width * bits // 32)]), "weight_scale": ("F16", [rows, groups]),
        "weight_shape": ("I64", [2]), "weight_zero_point": ("I32", [-(-rows * bits // 32), groups]),
    }  # fmt: skip


LAYOUTS = {
    "gptq": _packed_inputs, "auto_round": _packed_inputs, "awq": _packed_outputs, "compressed-tensors": _compressed
}  # fmt: skip
LINEARS = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "mlp.down_proj": (64, 128)}


def exported(
    model: Path, tmp: Path, to: str, scheme: QuantSpec | Callable[[LinearInfo], QuantSpec]
) -> tuple[dict[str, Any], Shapes, ExportReport]:
    """The quantization_config, the header of the weights, the report."""
    write_artifact(model, tmp / "artifact", scheme)
    report = export(tmp / "artifact", tmp / "out", to=to, progress=False)
    config = json.loads((tmp / "out/config.json").read_text())["quantization_config"]
    with safe_open(tmp / "out/model.safetensors", "numpy") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}
        header = {name: (part.get_dtype(), list(part.get_shape())) for name, part in parts.items()}
    return config, header, report


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize(("group", "symmetric"), [(32, True), (None, False)])
def test_config_and_tensors_are_what_its_loaders_register(
    models: Models, tmp_path: Path, to: str, group: int | None, symmetric: bool
) -> None:
    config, header, report = exported(models("llama, one block"), tmp_path, to, QuantSpec(4, group, symmetric))
    assert config.keys() >= KEYS[to]
    for name, (rows, width) in LINEARS.items():
        stem = f"model.layers.0.{name}."
        found = {key.removeprefix(stem): value for key, value in header.items() if key.startswith(stem)}
        wanted = LAYOUTS[to](rows, width, 4, width // group if group else 1)
        if to == "compressed-tensors" and symmetric:
            del wanted["weight_zero_point"]
        assert {key: value for key, value in found.items() if f".{key}" not in DROPPED} == wanted
    if to == "compressed-tensors":
        (scheme,) = config["config_groups"].values()
        weights = scheme["weights"]
        assert (config["format"], scheme["input_activations"], weights["dynamic"]) == ("pack-quantized", None, False)
        assert (weights["strategy"], weights["group_size"]) == (("group", 32) if group else ("channel", None))
    if to == "auto_round":  # `auto_round` alone is not among its SUPPORTED_FORMATS
        assert (config["packing_format"] == "auto_round:auto_gptq") is symmetric
    refused = to in ("gptq", "auto_round") and not symmetric
    assert any("vLLM" in note for note in report.notes) is refused


@pytest.mark.parametrize(("bits", "said"), [(3, True), (8, False)])
def test_gptq_bits_that_it_has_no_type_for_are_told(models: Models, tmp_path: Path, bits: int, said: bool) -> None:
    _, _, report = exported(models("llama, one block"), tmp_path, "gptq", QuantSpec(bits, 32))
    assert any("vLLM reads GPTQ of 4 and 8 bits" in note for note in report.notes) is said


def its_scheme(config: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Bits and group of a linear, by override_config of its gptq_utils.py."""
    for pattern, scheme in config["dynamic"].items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
            return scheme["bits"], scheme["group_size"]
    return config["bits"], config["group_size"]


def test_a_fused_linear_finds_the_scheme_of_its_parts(models: Models, tmp_path: Path) -> None:
    def scheme(info: LinearInfo) -> QuantSpec:
        first = info.name.startswith("model.layers.0.") and info.name.endswith(("q_proj", "k_proj", "v_proj"))
        return QuantSpec(8, 64) if first else QuantSpec(4, 32)

    config, _, report = exported(models("llama"), tmp_path, "gptq", scheme)
    assert its_scheme(config, "model.layers.0.self_attn.qkv_proj") == (8, 64)
    assert its_scheme(config, "model.layers.0.self_attn.k_proj") == (8, 64)
    assert its_scheme(config, "model.layers.1.self_attn.qkv_proj") == (4, 32)
    assert its_scheme(config, "model.layers.0.mlp.gate_up_proj") == (4, 32)
    assert not any("vLLM" in note for note in report.notes)


def test_parts_that_differ_are_told(models: Models, tmp_path: Path) -> None:
    def scheme(info: LinearInfo) -> QuantSpec:
        return QuantSpec(8 if info.name.endswith("k_proj") else 4, 32)

    _, _, report = exported(models("llama, one block"), tmp_path, "gptq", scheme)
    assert any("model.layers.0.self_attn.qkv_proj as one" in note for note in report.notes)


def test_symmetric_codes_lie_around_the_middle_that_its_types_imply(models: Models, tmp_path: Path) -> None:
    """uint4b8: its kernels take 8 from every code of a symmetric weight and read no zero point."""
    exported(models("llama, one block"), tmp_path, "gptq", QuantSpec(4, 32))
    with safe_open(tmp_path / "out/model.safetensors", "numpy") as file:
        assert np.all(file.get_tensor("model.layers.0.mlp.up_proj.qzeros").view(np.uint32) == 0x77777777)
