"""What a checkpoint's owner computes with, by the owner's own code, in its own environment.

    owners.py FOLDER…

Loads the tensors of each FOLDER into the owner's layer class and asks that class for its weights:

    auto_round    auto_round_extension.torch's QuantLinear of the packing: the identity times the layer
    awq           dequantize_gemm of AutoAWQ, or of auto_round for what it wrote; gemv has kernels for GPUs alone, so
                  what is unpacked is packed again by AutoAWQ's WQLinear_GEMV, and must be the file's tensors
    gptq          GPTQModel's TorchLinear: convert_gptq_v1_to_v2_format_module, dequantize_weight
    ct            compressed-tensors' compressor of the format: decompress
    olive         Olive's QuantLinear: unpack_and_dequantize

with scales turned to float32 first, so that nothing is rounded on the way.  The same code is asked a second time, given
scales of one: what comes is the integers, code - zero_point.  Writes `<layer>.weight` and `<layer>.integers` to
`owner.safetensors` in FOLDER; the exit code is 1 where that failed.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # GPTQModel's compiled layer keeps the shapes of the one before

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def of_auto_round(parts: Tensors, bits: int, group: int, packing: str) -> torch.Tensor:
    """[N, K], as auto-round's torch layers compute it."""
    if "awq" in packing:
        try:
            from awq.utils.packing_utils import dequantize_gemm
        except ImportError:
            from auto_round.export.export_to_awq.utils import dequantize_gemm

        width = parts["qweight"].shape[0]
        size = width if group == -1 else group
        return dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"].float(), bits, size).T
    if packing == "auto_round:auto_gptq":
        from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
    else:
        from auto_round_extension.torch.qlinear_torch import QuantLinear
    width, rows = parts["qweight"].shape[0] * 32 // bits, parts["qweight"].shape[1]
    layer = QuantLinear(bits, group, width, rows, bias=False)
    layer.qweight, layer.qzeros, layer.scales = parts["qweight"], parts["qzeros"], parts["scales"].float()
    return layer(torch.eye(width)).T


def of_gemv(parts: Tensors, group: int) -> torch.Tensor:
    """[N, K], unpacked here, and packed again by AutoAWQ's own code to what the file has."""
    from awq.modules.linear.gemv import WQLinear_GEMV

    nibbles = torch.arange(0, 32, 4)
    codes, zeros = (((parts[name][:, :, None] >> nibbles) & 15).flatten(1).float() for name in ("qweight", "qzeros"))
    groups = codes.shape[1] // group
    scales, zeros = parts["scales"].float()[:, :groups], zeros[:, :groups]
    weight = (codes - zeros.repeat_interleave(group, 1)) * scales.repeat_interleave(group, 1)
    linear = torch.nn.Linear(codes.shape[1], len(codes), bias=False)
    linear.weight.data = weight
    again = WQLinear_GEMV.from_linear(linear, 4, group, scales=scales, zeros=zeros)
    if not torch.equal(again.scales[:, :groups], parts["scales"][:, :groups]):
        raise ValueError("AutoAWQ stores other scales")
    for name in ("qweight", "qzeros"):
        if not torch.equal(getattr(again, name), parts[name]):
            raise ValueError(f"AutoAWQ packs other {name}")
    return weight


def of_gptq(parts: Tensors, bits: int, group: int, config: dict[str, Any]) -> torch.Tensor:
    """[N, K], as GPTQModel's torch layer computes it."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    width, rows = parts["qweight"].shape[0] * 32 // bits, parts["qweight"].shape[1]
    layer = TorchLinear(bits=bits, group_size=group, sym=config["sym"], desc_act=config["desc_act"], in_features=width,
                        out_features=rows, bias=False, pack_dtype=torch.int32, register_buffers=True)  # fmt: skip
    layer.qweight, layer.qzeros, layer.scales = parts["qweight"], parts["qzeros"].clone(), parts["scales"].float()
    layer.g_idx = parts.get("g_idx", torch.arange(width) // (width if group == -1 else group))
    if config.get("checkpoint_format", config.get("format", "gptq")) != "gptq_v2":
        convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    layer.post_init()
    return layer.dequantize_weight().T


def of_compressed_tensors(parts: Tensors, config: dict[str, Any]) -> torch.Tensor:
    """[N, K], as compressed-tensors decompresses it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    group = next(iter(config["config_groups"].values()))
    scheme = QuantizationScheme(**{key: value for key, value in group.items() if key != "format"})
    compressor = BaseCompressor.get_value_from_registry(group.get("format") or config["format"])
    parts = {name: values.float() if name == "weight_scale" else values for name, values in parts.items()}
    return compressor.decompress(parts, scheme)["weight"]


def of_olive(parts: Tensors, own: dict[str, Any]) -> torch.Tensor:
    """[N, K], as Olive's layers for linears and embeddings dequantize it."""
    from olive.common.quant.nn import QuantLinear

    rows, width = parts["qweight"].shape[0], parts["qweight"].shape[1] * 8 // own["bits"]
    layer = QuantLinear(width, rows, own["bits"], own["symmetric"], own["group_size"], bias=False)
    return layer.unpack_and_dequantize(parts["qweight"], parts["scales"].float(), parts.get("qzeros"))


def weight_of(parts: Tensors, config: dict[str, Any], own: dict[str, Any]) -> torch.Tensor:
    """[N, K], by the code of the format's owner.

    Args:
        parts: the layer's tensors.
        config: quantization_config.
        own: the same with what it says of this layer alone.
    """
    if config["quant_method"] == "compressed-tensors":
        return of_compressed_tensors(parts, config)
    if config["quant_method"] == "olive":
        return of_olive(parts, own)
    if config["quant_method"] == "gptq":
        return of_gptq(parts, own["bits"], own["group_size"], config)
    if config.get("version") == "gemv":
        return of_gemv(parts, own["group_size"])
    return of_auto_round(parts, own["bits"], own["group_size"], config.get("packing_format", "awq"))


def of_layer(module: str, config: dict[str, Any]) -> dict[str, Any]:
    """What a config says of a layer."""
    own = {
        **config,
        **config.get("extra_config", {}).get(module, {}),
        **(config.get("overrides") or {}).get(module, {}),
    }
    for pattern, scheme in (config.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("+:"), module):
            own |= scheme
    return own


def write(folder: Path) -> int:
    """Write owner.safetensors; returns of how many layers."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors: Tensors = {}
    for path in folder.glob("model*.safetensors"):
        tensors |= load_file(path)
    ending = ".weight_scale" if config["quant_method"] == "compressed-tensors" else ".scales"
    found: Tensors = {}
    for module in sorted(name.removesuffix(ending) for name in tensors if name.endswith(ending)):
        parts = {name.removeprefix(f"{module}."): values for name, values in tensors.items()
                 if name.rpartition(".")[0] == module}  # fmt: skip
        scales = parts[ending[1:]]
        with torch.no_grad():
            for part, own_scales in (("weight", scales), ("integers", torch.ones_like(scales))):
                given = {**parts, ending[1:]: own_scales}
                values = weight_of(given, config, of_layer(module, config)).contiguous()
                found[f"{module}.{part}"] = values.float() if part == "weight" else values.to(torch.int16)
    save_file(found, folder / "owner.safetensors")
    return len(found) // 2


def main(folders: list[str]) -> int:
    """Write owner.safetensors into each; returns in how many that failed."""
    failed = 0
    for folder in map(Path, folders):
        try:
            (folder / "owner.safetensors").unlink(missing_ok=True)
            print(f"{folder.name}: {write(folder)} layers", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAILED {folder.name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
