"""Folders that roundexport wrote, loaded by transformers with the owner's package, in the owner's environment.

    loaded.py FOLDER…

Prints per folder the largest difference between its logits and those in `expected.npz` (going_out.py), as a share of
the largest logit: as it loads, and computed in float32 from what the files hold.  For loaders turn embeddings, angles
and matrices into 16 bits on the way (auto-round forces the whole model to float16), and kernels for speed do more; so
for the second figure layers are those written in torch, and every float is taken from the file again.  Layers of AWQ
compute in float16 whatever they are given: they become plain linears of what their own function dequantizes.  GPTQ of
several schemes, which transformers does not load, is loaded by GPTQModel itself.  The exit code is 1 where the second
is above 1e-5, or a folder does not load.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

LIMIT = 1e-5


def load(folder: Path, plain: bool = False) -> torch.nn.Module:
    """The model; plain: with layers that compute in torch alone."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    method, more = config["quant_method"], dict[str, Any]()
    if method == "gptq" and config.get("dynamic"):
        from gptqmodel import BACKEND, GPTQModel

        # Left to itself it takes a kernel of 4 bits alone for layers of 8 as well, and fails; in float32 it takes none.
        loaded = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
        return loaded.model.eval()
    if plain and method == "gptq":
        more["quantization_config"] = GPTQConfig(bits=4, backend="torch")
    if plain and method == "awq":
        more["quantization_config"] = AwqConfig(backend="torch_awq")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **more).eval()


def restore(model: torch.nn.Module, folder: Path) -> None:
    """Every float of a model as its files have it, and rotary angles computed anew, all in float32."""
    torch.nn.Module.float(model)
    for path in folder.glob("model*.safetensors"):
        held = {name: values.float() for name, values in load_file(path).items() if values.is_floating_point()}
        model.load_state_dict(held, strict=False)
    for module in model.modules():
        if hasattr(module, "original_inv_freq"):
            module.inv_freq = type(module)(module.config).inv_freq.float()
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "AwqTorchLinear":
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, plain_linear(module))


def plain_linear(layer: Any) -> torch.nn.Linear:
    """A layer of AWQ as a linear of float32, by its package's function."""
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    scales = layer.scales.float()
    weight = dequantize_gemm(layer.qweight, layer.qzeros, scales, layer.bits, layer.group_size).T.contiguous()
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
    linear.weight.data = weight
    if layer.bias is not None:
        linear.bias.data = layer.bias.float()
    return linear


def difference(model: torch.nn.Module, expected: Mapping[str, Any]) -> float:
    """Of the logits, as a share of the largest."""
    with torch.no_grad():
        logits = model(torch.from_numpy(expected["ids"])).logits.float().numpy()
    return float(np.abs(logits - expected["logits"]).max() / np.abs(expected["logits"]).max())


def main(folders: list[str]) -> int:
    """Print a row per folder."""
    held = True
    for folder in map(Path, folders):
        try:
            expected = np.load(folder / "expected.npz")
            errors = [difference(load(folder), expected)]
            model = load(folder, plain=True)
            layers = {type(module).__name__ for name, module in model.named_modules() if name.endswith("q_proj")}
            restore(model, folder)
            errors.append(difference(model, expected))
        except Exception as error:
            held = False
            print(f"{folder.name:34} | FAILED {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        held &= errors[1] <= LIMIT
        print(
            f"{folder.name:34} | {errors[0]:.1e} as it loads, {errors[1]:.1e} in float32 | {', '.join(sorted(layers))}",
            flush=True,
        )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
