"""`Job`: everything that is constant during a tuning run, made from the settings before any work begins.

    settings ─ recipe ─ methods with their Settings ─┐
    model    ─ checkpoint ─ weights per block ───────┴─ plan        all refusals that need no data happen on this way

The settings are recorded in two forms.  :meth:`Job.key` determines every byte of the result, and an interrupted run
resumes only under an equal key (checkpointing.py); it holds the content of files and the versions of libraries.
:meth:`Job.recorded` is the record in the artifact's manifest.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from roundexport.algorithms.interface import BlockSize
from roundexport.calibration.chosen import chosen_source
from roundexport.calibration.mixture import by_content
from roundexport.environment.memory import MemoryLimit
from roundexport.environment.versions import library_versions
from roundexport.errors import CheckpointError, UnsupportedError, UsageError
from roundexport.model.bf16_linears import in_hardware
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.experts import Experts
from roundexport.model.side_files import side_files_digest
from roundexport.model.streamed_model import StreamedModel
from roundexport.progress import Progress
from roundexport.schemes.layer_plan import Plan, make_plan
from roundexport.schemes.rules import read_rules
from roundexport.types import PAIRS, WITHOUT_TOKENS

from .chosen_methods import (
    ChosenFinisher,
    ChosenRounding,
    ChosenTransform,
    choose_finisher,
    choose_transform,
    takes_steps,
    with_samples,
)
from .method_options import check_names
from .recipes import resolve
from .settings import TuneSettings


@dataclass(frozen=True, eq=False)
class Job:
    """A tuning run; made by :meth:`of`.

    Args:
        checkpoint: the float model.
        weights: where its parameters come from.
        plan: what is quantized, and how.
        rounding: the rounding method.
        transform: the transform before it, or None.
        finisher: the tuning of the whole model after it, or None.
        device: where blocks are computed.
        settings: what was asked for.
    """

    checkpoint: Checkpoint
    weights: StreamedModel
    plan: Plan
    rounding: ChosenRounding
    transform: ChosenTransform | None
    finisher: ChosenFinisher | None
    device: torch.device
    settings: TuneSettings

    @classmethod
    def of(cls, model: str | Path, settings: TuneSettings, progress: bool | Progress = False) -> Job:
        """Find methods and device, open the model, decide for every weight.

        Args:
            model: Hugging Face model folder or hub id.
            settings: how to tune.
            progress: where to report what it takes to open the model.

        Raises:
            UsageError: a setting makes no sense.
            SpecError: the group size does not divide a layer's K (named).
            CheckpointError: the model cannot be read, or holds weights that are not finite (named).
            UnsupportedError: the model has no blocks that can be tuned one at a time.
        """
        composition = resolve(settings)
        taking_part = (composition.transform, composition.algorithm, composition.finish)
        settings = with_samples(dataclasses.replace(settings, method_settings=composition.method_settings))
        check_names(settings.method_settings, [name for name in taking_part if name])
        if settings.steps is not None and not takes_steps(settings):
            names = ", ".join(name for name in taking_part if name)
            raise UsageError(f"steps {settings.steps} do nothing: {names} has no steps; leave --steps out")
        without_steps = dataclasses.replace(settings, steps=None)
        rounding = ChosenRounding.of(composition.algorithm, without_steps if composition.finish else settings)
        transform = choose_transform(composition.transform, settings)
        finisher = choose_finisher(composition.finish, settings)
        settings = settings.settled(rounding.method.scheme_needs.values(), rounding.name)
        device = _device(settings.device)
        checkpoint = Checkpoint.open(model, progress=progress, part=settings.part, max_ram=settings.max_ram)
        if checkpoint.imported is not None:
            raise CheckpointError(
                f"{checkpoint.location}: its weights are quantized already ({checkpoint.imported.opened.title}), and "
                "rounding them again would lose more; roundexport import or convert takes their integers as they are, "
                "and to tune give the float model it was made from"
            )
        checkpoint.check_side_files()
        source = chosen_source(checkpoint, settings.calibration, settings.samples, settings.sample_len)
        settings = dataclasses.replace(settings, calibration=source)
        checkpoint.identify(Progress.of(progress))
        bfloat16 = settings.precision == "bfloat16" or (settings.precision == "auto" and in_hardware(device))
        if finisher is not None and checkpoint.task in WITHOUT_TOKENS:
            raise UnsupportedError(
                f"finish {composition.finish} tunes models of text as a whole; of one of images or sounds the blocks "
                "are tuned: leave --finish out"
            )
        weights = StreamedModel(checkpoint, bfloat16=bfloat16)
        plan = make_plan(weights.model, settings.schemes, weights.all_row_chunks())
        job = cls(checkpoint, weights, plan, rounding, transform, finisher, device, settings)
        job.check_task()
        if finisher is None:
            return job
        size = job.block_size(plan.stack.blocks[0], settings.samples, settings.sample_len)
        fitted = dataclasses.replace(size, max_bytes=MemoryLimit(settings.max_ram).most)
        return dataclasses.replace(job, finisher=finisher.fitted(fitted))

    def check_task(self) -> None:
        """Refuse what cannot be done with a model that is not a decoder, or that has an encoder and a decoder.

        Raises:
            UsageError: settings that exclude each other, or steps that a mixture of experts cannot have.
            UnsupportedError: naming the setting or the method, and those that can.
        """
        if self.fisher_samples and self.checkpoint.task in (*PAIRS, *WITHOUT_TOKENS):
            raise UnsupportedError(
                f"{self.rounding.name}.fisher_samples is for models of text; {self.checkpoint.location} is a model to "
                f"{self.checkpoint.task}: take --recipe default, or set it to 0"
            )
        if self.settings.activations and self.transform is not None:
            raise UsageError(
                f"activations measures what layers of the float model read, which transform {self.transform.name} "
                "changes; take one of them, and verify --activations measures an ONNX package"
            )
        if self.rounding.method.carries and getattr(self.rounding.settings, "steps", None) and self._has_experts:
            raise UsageError(
                f"steps of {self.rounding.name} on a block's output are not made for mixtures of experts, as "
                f"{self.checkpoint.location} is one; leave --steps out, or take --algorithm signround"
            )
        in_nats = {"activations": self.settings.activations, "target_kl": self.settings.target_kl is not None}
        for name in (name for name, asked in in_nats.items() if asked and self.checkpoint.task != "generate"):
            raise UnsupportedError(
                f"{name} is for decoders, whose loss is in nats; {self.checkpoint.location} is a model to "
                f"{self.checkpoint.task}: leave --{name.replace('_', '-')} out"
            )
        if self.checkpoint.task not in PAIRS:
            return
        method = self.rounding.method
        whole = {"transform": self.transform, "finish": self.finisher}
        refused = [f"{kind} {part.name}" for kind, part in whole.items() if part is not None]
        refused += [] if self.plan.bit_allocator is None else ["bits chosen per layer"]
        if method.needs_calibration and not method.carries:
            refused.append(f"algorithm {self.rounding.name}")
        if method.carries and getattr(self.rounding.settings, "steps", None):
            refused.append(f"steps of {self.rounding.name} on a block's output")
        if refused:
            raise UnsupportedError(
                f"{self.checkpoint.location} has an encoder and a decoder, for which {', '.join(refused)} is not made; "
                "rtn, optimal_rtn and gram are, with one scheme for all layers or rules"
            )

    @property
    def _has_experts(self) -> bool:
        return any(isinstance(module, Experts) for block in self.plan.stack.blocks for module in block.modules())

    @property
    def model(self) -> nn.Module:
        """The model; parameters that are not in memory are on the meta device."""
        return self.weights.model

    @property
    def precision(self) -> str:
        """Of the products in blocks, as far as any are computed."""
        return "bfloat16" if self.weights.bfloat16 and self.needs_samples else "float32"

    @property
    def needs_states(self) -> bool:
        """Whether hidden states must be taken through the blocks."""
        return bool(self.rounding.method.needs_calibration or self.transform)

    @property
    def reads_quantized(self) -> bool:
        """Whether anything looks at hidden states that come through quantized blocks."""
        method = self.rounding.method
        rounding = method.needs_calibration and method.reads_quantized(self.rounding.settings)
        return rounding or (self.transform is not None and self.transform.reads_quantized)

    @property
    def fisher_samples(self) -> int:
        """From how many samples of 512 tokens is measured what errors of outputs cost the model; 0: it is not."""
        return self.rounding.method.fisher_samples(self.rounding.settings)

    @property
    def needs_samples(self) -> bool:
        """Whether calibration samples are needed at all."""
        return bool(self.needs_states or self.plan.bit_allocator or self.finisher or self.settings.activations)

    @property
    def batch_size(self) -> int:
        """Samples that go through a block at a time."""
        return min(self.settings.batch_size, self.settings.samples)

    @property
    def max_bytes(self) -> int | None:
        """Memory that blocks stay within, as it was asked for; None: they take what helps, half of what is free."""
        return None if self.settings.max_ram is None else int(self.settings.max_ram * 2**30)

    def block_size(self, block: nn.Module, samples: int, length: int) -> BlockSize:
        """How large a block is, its place in the model, and the memory to stay within.

        Args:
            block: one of the model's.
            samples: calibration samples.
            length: tokens of each.
        """
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        return dataclasses.replace(
            BlockSize.of(block, samples, length),
            max_bytes=self.max_bytes,
            blocks=len(self.plan.stack.blocks),
            vocabulary=0 if head is None else len(head.weight),
        )

    def key(self) -> dict[str, Any]:
        """Everything that decides the bytes of the result, as JSON values."""
        return {
            "model": self.checkpoint.digest,
            "algorithm": self.rounding.to_json(),
            "linears": self.settings.spec().to_json(),
            "rules": self._rules(),
            "mix": self._bit_search(),
            "embedding_bits": self.settings.embedding_bits,
            **({} if (own := self.settings.embedding_group_size) == "auto" else {"embedding_group_size": own}),
            "everything": self.settings.everything,
            "transform": None if self.transform is None else self.transform.to_json(),
            "finish": None if self.finisher is None else self.finisher.to_json(),
            "calibration": self.samples_asked() if self.needs_samples else None,
            "device": self.device.type,
            "precision": self.precision,
            **({"activations": True} if self.settings.activations else {}),
            "versions": library_versions(),
        }

    def recorded(self, allocation: dict[str, Any] | None, activations: dict[str, Any] | None) -> dict[str, Any]:
        """What the manifest says of how the artifact was tuned.

        Args:
            allocation: the scheme of every layer, when bits were chosen per layer.
            activations: what activations in 8 bits cost each layer, where that was measured.
        """
        transform = {} if self.transform is None else {"transform": self.transform.to_json()}
        mixed = {} if allocation is None else {"mix": {**(self._bit_search() or {}), **allocation}}
        rules = {} if self.settings.rules is None else {"rules": self._rules()}
        own = dataclasses.asdict(self.rounding.settings)
        ran = {"seed": self.settings.seed, "device": self.device.type, "precision": self.precision}
        measured = {} if activations is None else {"activations": activations}
        return {**own, **ran, **transform, **mixed, **rules, **measured}

    def _rules(self) -> list[dict[str, Any]] | None:
        """The rules by content, so that a changed file is another request."""
        path = self.settings.rules
        return None if path is None else [dataclasses.asdict(rule) for rule in read_rules(path)]

    def _bit_search(self) -> dict[str, Any] | None:
        """How bits are to be chosen per layer; None where they are not."""
        if not self.settings.chooses_bits:
            return None
        names = ("target_bits", "choices", "tie", "scoring", "cost", "target_speedup", "cost_target")
        found = self.settings.to_json()
        own = {name: found[name] for name in ("target_kl", "group_choices") if found[name] is not None}
        if self.settings.target_kl is not None:
            own["kl_gain"] = self.settings.schemes.search.kl_gain
        return {**{name: found[name] for name in names}, **own}

    def samples_asked(self) -> dict[str, Any]:
        """The request for calibration samples: a file by its content, and the files by which the model reads it."""
        return {
            "side_files": side_files_digest(self.checkpoint.folder),
            "source": by_content(self.settings.calibration),
            "num_samples": self.settings.samples,
            **{name: getattr(self.settings, name) for name in ("sample_len", "seed")},
        }


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise NotImplementedError("it holds no numbers")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises for a device it lacks
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"device {name!r} cannot be used: {reason}; use cpu, or cuda or xpu where torch has it"
        ) from error
    return device
