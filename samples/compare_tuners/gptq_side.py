"""GPTQModel's side of compare.py (see side.py); settings are QuantizeConfig's own arguments.

Columns keep their order (its default, "group aware" reordering, leaves groups of neighbors), so its weights export as
plain groups.  The second version of its format holds zero points as they are (the first holds them less one, and zero
overflows).  Its thread pool wants two workers whatever the machine; GPTQMODEL_CPU_WORKERS gives it the second.
"""

import os
from importlib.metadata import version

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from side import Job, Stored, answer

if __name__ == "__main__":
    job = Job.from_arguments()
    config = QuantizeConfig(**job.settings, format="gptq_v2", offload_to_disk=False, device="cpu")
    made = GPTQModel.load(job.model, config, dtype=torch.float32)
    made.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in job.ids.tolist()], batch_size=8)
    packed = {name: module for name, module in made.model.named_modules() if hasattr(module, "dequantize_weight")}
    weights = {f"{name}.weight": module.dequantize_weight().float().T for name, module in packed.items()}
    bits, group = job.settings["bits"], job.settings["group_size"]
    # Its checkpoints hold zero points in symmetric layers too, all of one value; no package has to keep these.
    how = Stored(bits, group, 16 + (0 if job.settings["sym"] else bits))
    answer(job, version("gptqmodel"), weights, dict.fromkeys(packed, how))
