"""HQQ's side of compare.py (see side.py): half-quadratic, needs no data; groups along K (axis 1), as the others'.

Scales and zero points are float16, so it stores more per group than the others.
"""

from importlib.metadata import version

import torch
from hqq.core.quantize import BaseQuantizeConfig, Quantizer
from side import Job, Stored, answer, block_linears
from transformers import AutoModelForCausalLM


def quantize(weight: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, Stored]:
    """HQQ's quantizer on one weight [N, K]; returns the dequantized weight and how it is stored."""
    config = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
    codes, meta = Quantizer.quantize(
        weight, device="cpu", compute_dtype=torch.float16, bitpack=False, **config["weight_quant_params"]
    )
    # What it keeps is float16; the arithmetic of the comparison is float32.
    scale, zero = (meta[part].half().float() for part in ("scale", "zero"))
    restored = ((codes.float() - zero) * scale).reshape(weight.shape)
    return restored, Stored(bits, group_size, 16 + 16)


if __name__ == "__main__":
    job = Job.from_arguments()
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    made = {
        name: quantize(linear.weight.data, job.settings["bits"], job.settings["group_size"])
        for name, linear in block_linears(model).items()
    }
    weights = {f"{name}.weight": weight for name, (weight, _) in made.items()}
    answer(job, version("hqq"), weights, {name: how for name, (_, how) in made.items()})
