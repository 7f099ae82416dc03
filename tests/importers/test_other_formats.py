"""auto-round, AWQ and compressed-tensors, packed by their published rules; what each of them refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from foreign_checkpoints import Grid, awq_tensors, ct_config, ct_tensors, gptq_tensors, olive_tensors, random_grid
from import_tools import Open, assert_arrived

from roundexport.errors import CheckpointError, RoundexportError, UnsupportedError

AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
OLIVE = {"quant_method": "olive", "bits": 4, "group_size": 32, "symmetric": False, "modules_to_not_convert": ["a"]}
PACKINGS = {"auto_round": 2, "auto_round:gptqmodel": 2, "auto_round:auto_gptq": 1}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_auto_rounds_own_packings_arrive(opened: Open, packing: str, bits: int, symmetric: bool) -> None:
    grid = random_grid(bits, bits, 32, symmetric)
    config = {**AUTO_ROUND, "bits": bits, "sym": symmetric, "packing_format": packing}
    assert_arrived(opened(config, gptq_tensors("layer", grid, PACKINGS[packing])), "layer", grid)


@pytest.mark.parametrize("bits", [4, 5, 6, 7])
def test_auto_rounds_awq_packing_arrives(opened: Open, bits: int) -> None:
    grid = random_grid(bits, bits)
    config = {**AUTO_ROUND, "bits": bits, "packing_format": "auto_round:auto_awq"}
    assert_arrived(opened(config, awq_tensors("layer", grid)), "layer", grid)


def test_extra_config_names_layers_or_patterns(opened: Open) -> None:
    grids = {"a.1.up": random_grid(3, 8, 64), "a.10.up": random_grid(4), "b.down": random_grid(5, 2, 16)}
    extra = {"a.1.up": {"bits": 8, "group_size": 64}, r"^b\..*": {"bits": 2, "group_size": 16}, "a.1.o": {"bits": 16}}
    tensors = {name: part for module, grid in grids.items() for name, part in gptq_tensors(module, grid, 2).items()}
    found = opened({**AUTO_ROUND, "packing_format": "auto_round", "extra_config": extra}, tensors)
    for module, grid in grids.items():
        assert_arrived(found, module, grid)


@pytest.mark.parametrize("layout", ["gemm", "gemv"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_awqs_layouts_arrive(opened: Open, layout: str, group: int) -> None:
    grid = random_grid(group=group)
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": group, "version": layout.upper()}
    assert_arrived(opened(old, awq_tensors("layer", grid, layout)), "layer", grid)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_packed_integers_arrive(opened: Open, bits: int, symmetric: bool) -> None:
    grid = random_grid(bits, bits, 32, symmetric, rows=40)
    config = ct_config("pack-quantized", num_bits=bits, symmetric=symmetric)
    assert_arrived(opened(config, ct_tensors("layer", grid, True, symmetric)), "layer", grid)


@pytest.mark.parametrize("form", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_int8_tensors_arrive(opened: Open, form: str, bits: int) -> None:
    grid = random_grid(bits, bits, -1)
    config = ct_config(form, num_bits=bits, strategy="channel", group_size=None)
    found = opened(config, ct_tensors("layer", grid, packed=False))
    assert_arrived(found, "layer", grid)
    assert not found.notes


def test_one_scale_for_a_tensor_is_repeated(opened: Open) -> None:
    grid = random_grid(8, 8, -1, symmetric=True)
    one = Grid(8, grid.codes, np.full_like(grid.scales, grid.scales[0, 0]), grid.zeros)
    tensors = {**ct_tensors("layer", one, False, True), "layer.weight_scale": one.scales[0]}
    config = ct_config("int-quantized", num_bits=8, symmetric=True, strategy="tensor", group_size=None)
    assert_arrived(opened(config, tensors), "layer", one)


def test_groups_of_targets_and_what_becomes_of_activations(opened: Open) -> None:
    grids = {"a.up": random_grid(3, 8, 64), "a.down": random_grid(4)}
    config = ct_config("pack-quantized")
    own = {"targets": ["re:.*up$"], "weights": {**config["config_groups"]["group_0"]["weights"], "num_bits": 8,
           "group_size": 64}, "input_activations": {"num_bits": 8}}  # fmt: skip
    config["config_groups"]["group_1"] = own
    tensors = {name: part for module, grid in grids.items() for name, part in ct_tensors(module, grid).items()}
    tensors["a.up.input_scale"] = np.ones(1, np.float32)
    found = opened(config, tensors)
    for module, grid in grids.items():
        assert_arrived(found, module, grid)
    assert "a.up.input_scale" in found.layers["a.up.weight"].tensors
    assert "activations were quantized too" in found.notes[0]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("group", "symmetric"), [(32, True), (128, False), (16, False)])
def test_olives_bytes_arrive(opened: Open, bits: int, group: int, symmetric: bool) -> None:
    grid = random_grid(bits, bits, group, symmetric, rows=5)
    config = {**OLIVE, "bits": bits, "group_size": group, "symmetric": symmetric}
    assert_arrived(opened(config, olive_tensors("layer", grid, symmetric)), "layer", grid)


def test_olives_overrides_name_layers_or_patterns(opened: Open) -> None:
    grids = {"a.up": random_grid(3, 8, 64), "a.down": random_grid(4), "b.down": random_grid(5, 4, 16)}
    overrides = {"a.up": {"bits": 8, "group_size": 64}, r"re:b\..*": {"group_size": 16, "bits": None}}
    tensors = {name: part for module, grid in grids.items() for name, part in olive_tensors(module, grid).items()}
    found = opened({**OLIVE, "overrides": overrides}, tensors)
    for module, grid in grids.items():
        assert_arrived(found, module, grid)


def _nothing(_: dict[str, Any]) -> None:
    return


def _set(name: str, values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: values})


Change = Callable[[dict[str, Any]], Any]
MADE = {
    "auto_round": (AUTO_ROUND, gptq_tensors("layer", random_grid(), 2)),
    "awq": (AWQ, awq_tensors("layer", random_grid())),
    "ct": (ct_config("pack-quantized"), ct_tensors("layer", random_grid())),
    "olive": (OLIVE, olive_tensors("layer", random_grid())),
    "ct8": (ct_config("int-quantized", strategy="channel"), ct_tensors("layer", random_grid(group=-1), packed=False)),
}
FLOAT = ct_config("pack-quantized", type="float")
REFUSED: list[tuple[str, dict[str, Any], Change, type[RoundexportError], str]] = [
    ("auto_round", {"packing_format": "auto_round:fp8_static"}, _nothing, UnsupportedError, "fp8_static.*not read"),
    ("auto_round", {"packing_format": "auto_round:fake"}, _nothing, UnsupportedError, "fake.*not read"),
    ("auto_round", {"data_type": "mx_fp"}, _nothing, UnsupportedError, "mx_fp.*not read"),
    ("auto_round", {"data_type": "nv_fp"}, _nothing, UnsupportedError, "nv_fp.*not read"),
    ("auto_round", {"act_bits": 8}, _nothing, UnsupportedError, "quantizes activations"),
    ("auto_round", {"rotation_config": {"a": 1}}, _nothing, UnsupportedError, "rotates activations"),
    ("auto_round", {"extra_config": [1]}, _nothing, CheckpointError, "must map layers to settings"),
    ("auto_round", {"extra_config": {"la(": {"bits": 2}}}, _nothing, CheckpointError, "is not a pattern"),
    ("auto_round", {"extra_config": {"layer": {"bits": 16}}}, _nothing, CheckpointError, "leaves layer float"),
    ("auto_round", {"packing_format": "auto_round:auto_gptq"}, _nothing, CheckpointError, "the numbers say"),
    ("awq", {"version": "gemv_fast"}, _nothing, UnsupportedError, "one kernel's own"),
    ("awq", {"bits": 8}, _nothing, UnsupportedError, "has 4 to 7 bits"),
    ("awq", {"group_size": 64}, _nothing, CheckpointError, "make it I32"),
    ("awq", {"version": "gemv"}, _nothing, CheckpointError, "layer"),
    ("awq", {}, dict.clear, CheckpointError, "no layer has a qweight"),
    ("awq", {}, _set("mlp.act.scales", np.ones(8, np.float16)), UnsupportedError, r"mlp\.act\.scales is for what an"),
    ("awq", {}, _set("layer.scales", np.ones((4, 8), np.float16)), CheckpointError, r"scales is F16 \[4, 8\]"),
    ("ct", {"format": "float-quantized"}, _nothing, UnsupportedError, "float-quantized.*not read"),
    ("ct", {"format": "nvfp4-pack-quantized"}, _nothing, UnsupportedError, "nvfp4-pack-quantized.*not read"),
    ("ct", {"config_groups": FLOAT["config_groups"]}, _nothing, UnsupportedError, "holds float weights"),
    ("ct", {"config_groups": None}, _nothing, CheckpointError, "no config_groups"),
    ("ct", {"config_groups": {"a": {"targets": ["other"]}}}, _nothing, CheckpointError, "among its targets"),
    ("ct", {"config_groups": {"a": {"targets": ["re:("]}}}, _nothing, CheckpointError, "not a regular expression"),
    ("ct", {"kv_cache_scheme": {"num_bits": 8}}, _nothing, UnsupportedError, "quantized KV cache"),
    ("ct", {"transform_config": {"a": 1}}, _nothing, UnsupportedError, "rotates"),
    ("ct", {"sparsity_config": {"format": "sparse-24-bitmask"}}, _nothing, UnsupportedError, "sparse weights"),
    ("ct", {}, _set("layer.weight_shape", np.array([64, 8])), CheckpointError, "make it I32"),
    ("ct", {}, _set("layer.weight_shape", np.array([3, 128])), CheckpointError, "weight_packed has 64 rows"),
    ("ct", {}, lambda t: t.pop("layer.weight_zero_point"), CheckpointError, "no weight_zero_point"),
    ("ct", {}, dict.clear, CheckpointError, "no layer has packed"),
    ("olive", {"group_size": 0}, _nothing, UnsupportedError, "one scale for a whole tensor is not read"),
    ("olive", {"bits": 3}, _nothing, UnsupportedError, "3 bits are not read"),
    ("olive", {"overrides": ["layer"]}, _nothing, CheckpointError, "must map layers to settings"),
    ("olive", {"overrides": {"re:(": {}}}, _nothing, CheckpointError, "not a regular expression"),
    ("olive", {}, _set("layer.qweight", np.ones((64, 16), np.int32)), CheckpointError, "qweight is I32"),
    ("olive", {}, dict.clear, CheckpointError, "no layer has a qweight"),
    ("ct8", {}, _set("layer.weight", np.full((64, 128), 9, np.int8)), CheckpointError, "beyond 4 bits"),
    ("ct8", {}, _set("layer.weight", np.ones((64, 128), np.float16)), UnsupportedError, "only integers are read"),
]  # fmt: skip


@pytest.mark.parametrize(("made", "config", "change", "kind", "says"), REFUSED)
def test_what_cannot_be_read_is_refused_by_name(
    opened: Open, made: str, config: dict[str, Any], change: Change, kind: type[RoundexportError], says: str
) -> None:
    base, tensors = MADE[made][0], dict(MADE[made][1])
    change(tensors)
    with pytest.raises(kind, match=says):
        for layer in opened({**base, **config}, tensors or {"a": np.zeros(1, np.float32)}).layers.values():
            layer.read()
