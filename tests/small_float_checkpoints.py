"""Model folders in MXFP4 and FP8, made of float ones: by arithmetic on floats, with nothing of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mxfp4_folder(source: Path, out: Path) -> None:
    """A gpt-oss folder whose experts are 4-bit floats, 32 along the inputs to an exponent."""

    def packed(name: str, values: Tensor) -> dict[str, Tensor]:
        if not name.endswith((".gate_up_proj", ".down_proj")):
            return {name: values}
        blocks = values.swapaxes(1, 2).unflatten(-1, (-1, 32))  # [E, K, N] to rows of inputs
        exponent = torch.floor(torch.log2(blocks.abs().amax(-1, keepdim=True))) - 2
        codes = (blocks[..., None] / 2 ** exponent[..., None] - VALUES).abs().argmin(-1).to(torch.uint8)
        pairs = codes[..., 0::2] | codes[..., 1::2] << 4
        return {f"{name}_blocks": pairs, f"{name}_scales": (exponent[..., 0] + 127).to(torch.uint8)}

    _rewrite(source, out, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, packed)


def fp8_folder(source: Path, out: Path, block: int) -> None:
    """A folder whose linears in blocks are 8-bit floats with a scale per ``block`` × ``block``."""

    def packed(name: str, values: Tensor) -> dict[str, Tensor]:
        if "layers." not in name or values.ndim != 2 or name.endswith("gate.weight"):
            return {name: values}
        tiles = values.unflatten(0, (-1, block)).unflatten(-1, (-1, block))
        scale = tiles.abs().amax((1, 3)) / 448
        codes = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn).reshape(values.shape)
        return {name: codes, f"{name}_scale_inv": scale}

    _rewrite(source, out, {"quant_method": "fp8", "weight_block_size": [block, block]}, packed)


def _rewrite(source: Path, out: Path, config: dict[str, Any], packed: Any) -> None:
    tensors: dict[str, Tensor] = {}
    for name, values in load_file(source / "model.safetensors").items():
        tensors.update(packed(name, values))
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (out / path.name).write_bytes(path.read_bytes())
    save_file({name: values.contiguous() for name, values in tensors.items()}, out / "model.safetensors")
    described = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**described, "quantization_config": config}))
