"""Checkpoints of other quantizers, packed here one code at a time by the rules their owners publish.

Nothing of the importers is used: words are made of Python integers, code k of b bits at bit k·b of a row's stream.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Grid:
    """A weight [N, K] on a grid: codes, scales [N, G] and zero points [N, G]."""

    bits: int
    codes: Array
    scales: Array
    zeros: Array

    @property
    def group(self) -> int:
        """Inputs per scale."""
        return int(self.codes.shape[1] // self.scales.shape[1])

    def weight(self) -> Array:
        """What it means, float32."""
        zeros, scales = (np.repeat(part, self.group, 1).astype(np.float32) for part in (self.zeros, self.scales))
        return np.asarray((self.codes.astype(np.float32) - zeros) * scales)


def grid_of(weight: Array, bits: int, group: int, symmetric: bool) -> Grid:
    """Round to nearest."""
    rows, width = weight.shape
    parts = weight.astype(np.float32).reshape(rows, -1, width if group == -1 else group)
    top = (1 << bits) - 1
    if symmetric:
        scales = (np.abs(parts).max(-1) / (top / 2)).astype(np.float16)
        zeros = np.full(scales.shape, 1 << (bits - 1))
    else:
        low, high = np.minimum(parts.min(-1), 0), np.maximum(parts.max(-1), 0)
        scales = ((high - low) / top).astype(np.float16)
        zeros = np.clip(np.round(-low / scales.astype(np.float32)), 1, top).astype(int)
    codes = np.clip(np.round(parts / scales.astype(np.float32)[..., None]) + zeros[..., None], 0, top)
    return Grid(bits, codes.reshape(rows, width).astype(int), scales, zeros)


def words(rows: Array, bits: int) -> Array:
    """Each row as one bit stream, in 32-bit words."""
    packed = []
    for row in np.asarray(rows).tolist():
        stream = sum((int(code) & ((1 << bits) - 1)) << (bits * place) for place, code in enumerate(row))
        packed.append([(stream >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(row) * bits // 32))])
    return np.array(packed, np.uint32).view(np.int32)


def gptq_tensors(module: str, grid: Grid, version: int, g_idx: Sequence[int] | None = None) -> dict[str, Array]:
    """A layer as GPTQ stores it: v1 with zero points one too low, v2 as they are."""
    width = grid.codes.shape[1]
    order = np.arange(width) // grid.group if g_idx is None else np.array(g_idx)
    return {
        f"{module}.qweight": np.ascontiguousarray(words(grid.codes, grid.bits).T),
        f"{module}.qzeros": words(grid.zeros.T - (1 if version == 1 else 0), grid.bits),
        f"{module}.scales": np.ascontiguousarray(grid.scales.T),
        f"{module}.g_idx": order.astype(np.int32),
    }


def gptq_config(version: int | None, bits: int = 4, group: int = 32, sym: bool = False, **more: Any) -> dict[str, Any]:
    """Its quantization_config."""
    form = {} if version is None else {"checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    own = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": False}
    return {**own, **form, **more}


def random_grid(seed: int = 0, bits: int = 4, group: int = 32, symmetric: bool = False, rows: int = 64) -> Grid:
    """Of normal weights [rows, 128]."""
    weight = np.random.default_rng(seed).normal(size=(rows, 128)) * 0.3
    return grid_of(weight, bits, group, symmetric)


def rewrite_model(
    source: Path, out: Path, config: dict[str, Any], quantize: Any, only: str = "layers."
) -> dict[str, Grid]:
    """Copy a float model folder with its linears in blocks replaced by ``quantize(module, weight) -> (tensors, Grid)``.

    Returns:
        The grid of every replaced module.
    """
    grids, kept = {}, {}
    for name, values in load_file(source / "model.safetensors").items():
        if values.ndim == 2 and only in name:
            module = name.removesuffix(".weight")
            tensors, grids[module] = quantize(module, values)
            kept.update(tensors)
        else:
            kept[name] = values
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (out / path.name).write_bytes(path.read_bytes())
    save_file(kept, out / "model.safetensors", {"format": "pt"})
    described = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**described, "quantization_config": config}))
    return grids


def awq_tensors(module: str, grid: Grid, layout: str = "gemm") -> dict[str, Array]:
    """A layer as AutoAWQ stores it: gemm along the outputs, columns 0 2 4 6 1 3 5 7 from the lowest bits; or gemv."""
    if layout == "gemm":
        order = [8 * run + column for run in range(len(grid.codes) // 8) for column in (0, 2, 4, 6, 1, 3, 5, 7)]
        return {
            f"{module}.qweight": words(grid.codes.T[:, order], grid.bits),
            f"{module}.qzeros": words(grid.zeros.T[:, order], grid.bits),
            f"{module}.scales": np.ascontiguousarray(grid.scales.T),
        }
    groups, multiple = grid.scales.shape[1], {64: 2, 32: 4}.get(grid.group, 1)
    held = math.ceil(math.ceil(groups / 8) / multiple) * multiple
    fill = ((0, 0), (0, 8 * held - groups))
    return {
        f"{module}.qweight": words(grid.codes, 4),
        f"{module}.qzeros": words(np.pad(grid.zeros, fill), 4),
        f"{module}.scales": np.pad(grid.scales, fill),
    }


def ct_tensors(module: str, grid: Grid, packed: bool = True, symmetric: bool = False) -> dict[str, Array]:
    """A layer as compressed-tensors stores it: signed integers, packed with 2^(b-1) added, or as int8."""
    middle = 1 << (grid.bits - 1)
    own: dict[str, Array] = {f"{module}.weight_scale": grid.scales}
    if packed:
        own[f"{module}.weight_packed"] = words(grid.codes, grid.bits)
        own[f"{module}.weight_shape"] = np.array(grid.codes.shape)
        zeros = np.ascontiguousarray(words(grid.zeros.T, grid.bits).T)
    else:
        own[f"{module}.weight"] = (grid.codes - middle).astype(np.int8)
        zeros = (grid.zeros - middle).astype(np.int8)
    return own if symmetric else {**own, f"{module}.weight_zero_point": zeros}


def olive_tensors(module: str, grid: Grid, symmetric: bool = False) -> dict[str, Array]:
    """A layer as Olive stores it: bytes along the inputs, from the lowest bits on; zero points along G likewise."""
    per_byte = 8 // grid.bits

    def packed(codes: Array) -> Array:
        padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_byte)))
        rows = [[sum(int(code) << (grid.bits * place) for place, code in enumerate(run)) for run in row]
                for row in padded.reshape(len(padded), -1, per_byte)]  # fmt: skip
        return np.array(rows, np.uint8)

    own = {f"{module}.qweight": packed(grid.codes), f"{module}.scales": grid.scales}
    return own if symmetric else {**own, f"{module}.qzeros": packed(grid.zeros)}


def ct_config(form: str, **weights: object) -> dict[str, Any]:
    """Its quantization_config, one group for all linears."""
    usual = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": {**usual, **weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
