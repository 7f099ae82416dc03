"""GPTQ's layout, packed by its published rule: integers before are integers after, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from foreign_checkpoints import Grid, gptq_config, gptq_tensors, random_grid
from import_tools import Open, assert_arrived

from roundexport.errors import CheckpointError, RoundexportError, UnsupportedError
from roundexport.importers._tensors import Tensors


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group", "symmetric"), [(32, True), (16, False), (-1, False), (128, True)])
def test_integers_arrive(opened: Open, version: int, bits: int, group: int, symmetric: bool) -> None:
    grid = random_grid(bits, bits, group, symmetric)
    found = opened(gptq_config(version, bits, group, symmetric), gptq_tensors("layer", grid, version))
    assert_arrived(found, "layer", grid)
    assert found.layers["layer.weight"].read().spec.symmetric == symmetric


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_mixed_up_convention_is_detected_both_ways(opened: Open, seed: int, symmetric: bool) -> None:
    grid = random_grid(seed, (2, 3, 4, 8 if symmetric else 4, 3)[seed], 32, symmetric)
    for stored, said in ((1, 2), (2, 1), (2, None)):
        with pytest.raises(CheckpointError, match=r"the numbers say stored .*Correct checkpoint_format"):
            opened(gptq_config(said, grid.bits, 32, symmetric), gptq_tensors("layer", grid, stored))


@pytest.mark.parametrize(("symmetric", "version", "most"), [(True, 1, 0), (True, 2, 0), (False, 1, 8), (False, 2, 8)])
def test_opening_reads_codes_of_few_layers_and_only_where_zero_points_do_not_tell(
    opened: Open, monkeypatch: pytest.MonkeyPatch, symmetric: bool, version: int, most: int
) -> None:
    grid, read = random_grid(symmetric=symmetric), Counter[str]()
    layers = {f"{number}.up": gptq_tensors(f"{number}.up", grid, version) for number in range(20)}
    reading = Tensors.read

    def counted(tensors: Tensors, name: str) -> Any:
        read[name.rpartition(".")[2]] += 1
        return reading(tensors, name)

    monkeypatch.setattr(Tensors, "read", counted)
    opened(
        gptq_config(version, sym=symmetric), {name: part for parts in layers.values() for name, part in parts.items()}
    )
    assert read["qzeros"] == 20 and read["scales"] == 0
    assert most * 0.75 <= read["qweight"] <= most


def test_a_convention_that_cannot_be_told_is_refused(opened: Open) -> None:
    grid = random_grid()
    odd = Grid(4, grid.codes, grid.scales, np.maximum(grid.zeros - 4, 1))
    with pytest.raises(CheckpointError, match="cannot be told"):
        opened(gptq_config(2), gptq_tensors("layer", odd, 2))


def test_at_8_bits_only_the_config_can_tell(opened: Open) -> None:
    grid = random_grid(bits=8)
    assert_arrived(opened(gptq_config(1, 8), gptq_tensors("layer", grid, 1)), "layer", grid)
    with pytest.raises(CheckpointError, match=r"cannot be told.*Name checkpoint_format"):
        opened(gptq_config(None, 8), gptq_tensors("layer", grid, 1))


def test_zero_points_of_zero_survive_the_borrow_of_v1(opened: Open) -> None:
    grid = random_grid(1)
    zeros = grid.zeros.copy()
    zeros[3:5, 1] = 0
    planted = Grid(4, grid.codes, grid.scales, zeros)
    tensors = gptq_tensors("layer", planted, 2)
    tensors["layer.qzeros"] = (tensors["layer.qzeros"].view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    assert_arrived(opened(gptq_config(1), tensors), "layer", planted)


def test_large_groups_are_stored_as_smaller_ones_with_equal_scales(opened: Open) -> None:
    grid = random_grid(group=64)
    wide = Grid(4, np.tile(grid.codes, (1, 8)), np.tile(grid.scales[:, :2], (1, 1)), np.tile(grid.zeros[:, :2], (1, 1)))
    found = opened(gptq_config(2, group=512), gptq_tensors("layer", wide, 2))
    assert_arrived(found, "layer", wide)
    assert found.layers["layer.weight"].read().spec.group_size == 256


def test_static_groups_in_another_order_are_put_into_theirs(opened: Open) -> None:
    grid, order = random_grid(2), np.array([2, 0, 3, 1])
    stored = Grid(4, grid.codes, grid.scales[:, np.argsort(order)], grid.zeros[:, np.argsort(order)])
    tensors = gptq_tensors("layer", stored, 1, np.repeat(order, 32).tolist())
    assert_arrived(opened(gptq_config(1, desc_act=True), tensors), "layer", grid)


def test_bits_of_their_own_per_layer(opened: Open) -> None:
    grids = {"a.up": random_grid(3, 4), "a.down": random_grid(4, 8, 64), "lm_head": random_grid(5, 4)}
    tensors = {name: values for module, grid in grids.items() for name, values in gptq_tensors(module, grid, 2).items()}
    dynamic = {r"+:a\.down": {"bits": 8, "group_size": 64}, r"-:a\.norm": {}}
    found = opened(gptq_config(2, dynamic=dynamic), tensors)
    for module, grid in grids.items():
        assert_arrived(found, module, grid)


def _without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.pop(name)


def _with(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: np.ascontiguousarray(change(tensors[name]))})


SCATTERED = np.random.default_rng(0).permutation(np.arange(128) // 32).astype(np.int32)
REFUSED: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], Any], type[RoundexportError], str]] = {
    "scattered groups": ({"desc_act": True}, _with("layer.g_idx", lambda _: SCATTERED), UnsupportedError, "act-order"),
    "no such group": ({}, _with("layer.g_idx", lambda g: g + 1), CheckpointError, "names group 4 of 4"),
    "no scales": ({}, _without("layer.scales"), CheckpointError, "no tensor layer.scales"),
    "no zero points": ({}, _without("layer.qzeros"), CheckpointError, "no tensor layer.qzeros"),
    "fewer outputs": ({}, _with("layer.scales", lambda s: s[:, :32]), CheckpointError, r"scales is F16 \[4, 32\]"),
    "other words": ({}, _with("layer.qweight", lambda w: w.astype(np.int64)), CheckpointError, "qweight is I64"),
    "one axis": ({}, _with("layer.qweight", lambda w: w.ravel()), CheckpointError, "a matrix is expected"),
    "infinite": ({}, _with("layer.scales", lambda s: s * np.inf), CheckpointError, "not finite"),
    "other bits": ({"bits": 8}, lambda _: None, CheckpointError, "make it I32"),
    "5 bits": ({"bits": 5}, lambda _: None, UnsupportedError, "in planes"),
    "no bits": ({"bits": None}, lambda _: None, UnsupportedError, "bits None"),
    "bits of text": ({"bits": "4"}, lambda _: None, UnsupportedError, "bits '4'"),
    "a short group": ({"group_size": 48}, lambda _: None, UnsupportedError, "does not divide its 128 inputs"),
    "a tiny group": ({"group_size": 8}, lambda _: None, UnsupportedError, "groups of 8"),
    "sym of text": ({"sym": "yes"}, lambda _: None, CheckpointError, "sym must be true or false"),
    "marlin": ({"checkpoint_format": "marlin"}, lambda _: None, UnsupportedError, "one kernel's own"),
    "int8 words": ({"pack_dtype": "int8"}, lambda _: None, UnsupportedError, "int8"),
    "rotated": ({"rotation": "hadamard"}, lambda _: None, UnsupportedError, "rotated"),
    "kept float": ({"dynamic": {"-:lay": {}}}, lambda _: None, CheckpointError, "leaves layer float"),
    "no pattern": ({"dynamic": {"(": {}}}, lambda _: None, CheckpointError, "not a regular expression"),
    "dynamic list": ({"dynamic": ["x"]}, lambda _: None, CheckpointError, "dynamic must map"),
    "not symmetric": ({"sym": True}, lambda _: None, CheckpointError, "says sym, but"),
    "twice": ({}, lambda t: t.update({"layer.weight": t["layer.scales"]}), CheckpointError, "twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(opened: Open, case: str) -> None:
    config, change, kind, words = REFUSED[case]
    tensors = gptq_tensors("layer", random_grid(), 2)
    change(tensors)
    with pytest.raises(kind, match=words):
        for layer in opened({**gptq_config(2), **config}, tensors).layers.values():
            layer.read()


# How each is called in docs/importing.md, and the reason that its refusal gives
NOT_INTEGERS: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, "places in a table"),
    "HQQ": ({"quant_method": "hqq"}, "zero points are fractions"),
    "NVFP4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "low-bit floats"),
    "FP8 of modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "low-bit floats"),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, "8-bit floats"),
    "AQLM": ({"quant_method": "aqlm"}, "learned tables"),
    "VPTQ": ({"quant_method": "vptq"}, "learned tables"),
    "Quark": ({"quant_method": "quark"}, "pack_method"),
    "torchao": ({"quant_method": "torchao"}, "pickled"),
    "quanto": ({"quant_method": "quanto"}, "pickled"),
    "unheard-of": ({"quant_method": "unheard-of"}, "is not known"),
}


@pytest.mark.parametrize("case", NOT_INTEGERS)
def test_formats_that_are_not_integers_on_a_grid_are_refused_with_what_to_do(opened: Open, case: str) -> None:
    config, says = NOT_INTEGERS[case]
    with pytest.raises(UnsupportedError, match=rf"{says}.*roundexport tune"):
        opened(config, {"a": np.zeros(1, np.float32)})


@pytest.mark.parametrize("older", ["load_in_4bit", "load_in_8bit"])
def test_bitsandbytes_is_known_without_its_name(opened: Open, older: str) -> None:
    with pytest.raises(UnsupportedError, match=r"quantized by bitsandbytes.*roundexport tune"):
        opened({older: True}, {"a": np.zeros(1, np.float32)})
