"""auto-round's side of compare.py (see side.py); settings are AutoRound's own arguments.

Dequantized weights are taken from its "fake" format, in the dtype in which it writes them.
"""

import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors import safe_open
from side import Job, Stored, answer
from transformers import AutoTokenizer


def tune(job: Job, folder: Path) -> None:
    """Run AutoRound; leaves dequantized weights as a checkpoint somewhere under ``folder``."""
    AutoRound(
        job.model,
        tokenizer=AutoTokenizer.from_pretrained(job.model),
        nsamples=len(job.ids),
        seqlen=job.ids.shape[1],
        batch_size=8,
        dataset=[row[None] for row in torch.from_numpy(job.ids)],
        device_map="cpu",
        **job.settings,
    ).quantize_and_save(str(folder), format="fake")


def changed(model: str, folder: Path) -> dict[str, torch.Tensor]:
    """Tensors in which a checkpoint somewhere under ``folder`` differs from the model's."""
    found = {}
    before = _tensors(Path(model))
    for name, value in _tensors(next(folder.rglob("config.json")).parent).items():
        if name in before and not torch.equal(value.float(), before[name].float()):
            found[name] = value
    return found


def stored(settings: dict, weights: dict[str, torch.Tensor]) -> dict[str, Stored]:
    """Its formats hold float16 scales and zero points of as many bits as a code."""
    bits, group = settings["bits"], settings["group_size"]
    each = Stored(bits, group, 16 + (0 if settings["sym"] else bits))
    return {name.removesuffix(".weight"): each for name, value in weights.items() if value.dim() == 2}


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found.update({name: tensors.get_tensor(name) for name in tensors.keys()})
    return found


if __name__ == "__main__":
    job = Job.from_arguments()
    scratch = job.out / "fake"
    tune(job, scratch)
    weights = changed(job.model, scratch)
    answer(job, version("auto-round"), weights, stored(job.settings, weights))
    shutil.rmtree(scratch)
