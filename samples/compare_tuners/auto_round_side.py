"""auto-round's side of compare.py (see side.py); settings are AutoRound's own arguments.

Dequantized weights are a block's as soon as it is done, and are left in OUT/blocks/NAME in the form of OUT itself:
first_blocks.py compares what is there of a run that takes hours.  The checkpoint of its "fake" format is not read: of
SmolLM2 nothing in it differed from the float model, and why was not looked into.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound
from auto_round.algorithms.composer import AlgorithmComposer
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


def leave_blocks(job: Job) -> None:
    """Make AutoRound leave the weights of every block in OUT/blocks as soon as it is done."""
    compress: Callable = AlgorithmComposer.compress_block

    def compress_and_leave(
        composer: AlgorithmComposer, block: torch.nn.Module, *given: object, **named: object
    ) -> tuple:
        made = compress(composer, block, *given, **named)
        name = named["block_ctx"].block_name
        linears = [n for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)]
        weights = {f"{name}.{n}.weight": block.get_submodule(n).weight for n in linears}
        answer(
            replace(job, out=job.out / "blocks" / name),
            version("auto-round"),
            weights,
            stored(job.settings, weights),
        )
        return made

    AlgorithmComposer.compress_block = compress_and_leave


def left(job: Job) -> dict[str, torch.Tensor]:
    """What `leave_blocks` has left: the weights of every block."""
    found = {}
    for folder in sorted((job.out / "blocks").iterdir()):
        found |= _tensors(folder)
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
    leave_blocks(job)
    scratch = job.out / "fake"
    tune(job, scratch)
    weights = left(job)
    answer(job, version("auto-round"), weights, stored(job.settings, weights))
    shutil.rmtree(scratch)
