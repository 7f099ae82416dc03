"""The one evaluator: dequantized weights put into the float model, compared on held-out text.

Per token: KL(float ‖ quantized) in nats, top-1 agreement, and the quantized model's loss, whose exponential is the
perplexity.  Standard errors are over windows of text, s / √n.  Everything is computed in float32 by torch, so that no
runtime's arithmetic is in the figures.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from roundexport.model.blocks import weight_of
from roundexport.model.checkpoint import Checkpoint

_BATCH = 4  # windows at a time


@dataclass(frozen=True, eq=False)
class Figures:
    """What one set of weights is worth: per window KL in nats per token, top-1 agreement and loss, float64 [windows].

    ``bits`` is mean bits per quantized weight, scales and zero points included.
    """

    bits: float
    kl: np.ndarray
    top1: np.ndarray
    loss: np.ndarray

    def to_json(self) -> dict[str, float]:
        """Means and standard errors."""
        perplexity = float(np.exp(self.loss.mean()))
        return {
            "bits_per_weight": self.bits,
            "kl": float(self.kl.mean()),
            "kl_se": _error(self.kl),
            "top1": float(self.top1.mean()),
            "top1_se": _error(self.top1),
            "perplexity": perplexity,
            "perplexity_se": perplexity * _error(self.loss),
        }


def ratio(one: Figures, other: Figures) -> tuple[float, float]:
    """KL of one over KL of the other, and its standard error by the delta method on the same windows."""
    value = one.kl.mean() / other.kl.mean()
    return float(value), _error(one.kl - value * other.kl) / float(other.kl.mean())


class Evaluator:
    """Compares dequantized weights with the float model.

    Args:
        checkpoint: the float model, a decoder.
        ids: held-out tokens, int64 [windows, length].
        keep: file of the float model's log-probabilities on them; it is made once.
    """

    def __init__(self, checkpoint: Checkpoint, ids: np.ndarray, keep: Path) -> None:
        self.checkpoint = checkpoint
        self.ids = torch.from_numpy(ids)
        self.reference = reference(checkpoint, self.ids, keep)

    def load(self, folder: Path) -> tuple[torch.nn.Module, dict[str, dict[str, int]]]:
        """The float model with a tuner's weights in it, and how each quantized layer is stored.

        Raises:
            ValueError: a linear of a block was not quantized, or embeddings changed.
        """
        tensors, layers = read(folder)
        model = self.checkpoint.load_model()
        put(model, tensors, set(layers), block_linears(model))
        return model, layers

    def measure(self, folder: Path) -> Figures:
        """Figures of what a tuner's side left in a folder (see side.py).

        Raises:
            ValueError: a linear of a block was not quantized, a layer holds more levels per group than its bits allow,
                or embeddings changed: the comparison would not be one of equals.
        """
        return self.compare(*self.load(folder))

    def compare(self, model: torch.nn.Module, layers: dict[str, dict[str, int]]) -> Figures:
        """Figures of a model with quantized weights.

        Raises:
            ValueError: a layer holds more levels per group than its bits allow.
        """
        kl, top1, loss = [], [], []
        for part, p in zip(self.ids.split(_BATCH), self.reference.split(_BATCH), strict=True):
            q = log_probabilities(model, part)
            kl.append((p.exp() * (p - q)).sum(-1).mean(1))
            top1.append((p.argmax(-1) == q.argmax(-1)).float().mean(1))
            loss.append(-q[:, :-1].gather(-1, part[:, 1:, None]).mean((1, 2)))
        parts = (torch.cat(values).double().numpy() for values in (kl, top1, loss))
        return Figures(bits_per_weight(model, layers), *parts)


def log_probabilities(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Of every next token, float32 [windows, length, vocabulary]."""
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=ids).logits.float(), -1)


def reference(checkpoint: Checkpoint, ids: torch.Tensor, keep: Path) -> torch.Tensor:
    """The float model's log-probabilities, as a file that is mapped; what was computed before is read.

    Args:
        checkpoint: the float model.
        ids: int64 [windows, length].
        keep: where they stay, 4 bytes each: 3 GiB for 32 windows of 512 tokens and a vocabulary of 49,152.
    """
    if not keep.exists():
        model = checkpoint.load_model()
        partial = keep.with_suffix(".part")
        shape = (*ids.shape, model.get_output_embeddings().weight.shape[0])
        kept = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
        for start in range(0, len(ids), _BATCH):
            kept[start : start + _BATCH] = log_probabilities(model, ids[start : start + _BATCH]).numpy()
        kept.flush()
        partial.replace(keep)
    return torch.from_numpy(np.load(keep, mmap_mode="c"))


def bits_per_weight(model: torch.nn.Module, layers: dict[str, dict[str, int]]) -> float:
    """Codes, scales and zero points over the quantized weights, after checking that the weights are what is claimed.

    Raises:
        ValueError: a group of weights has more distinct values than its bits allow.
    """
    bits = weights = 0
    for name, stored in layers.items():
        weight = weight_of(model.get_submodule(name))
        groups = weight.numel() // stored["group_size"]
        ordered = weight.reshape(groups, stored["group_size"]).sort(dim=1).values
        levels = 1 + int((ordered.diff(dim=1) != 0).sum(1).max())
        if levels > 2 ** stored["bits"]:
            raise ValueError(f"{name}: {levels} levels in a group of {stored['bits']}-bit weights")
        bits += weight.numel() * stored["bits"] + groups * stored["group_bits"]
        weights += weight.numel()
    return bits / weights


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, int]]]:
    """What a tuner's side left: tensors, and how each quantized layer is stored."""
    return load_file(folder / "weights.safetensors"), json.loads((folder / "report.json").read_text())["layers"]


def block_linears(model: torch.nn.Module) -> set[str]:
    """What everybody quantizes: the linears of all blocks."""
    return {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not n.endswith("lm_head")}


def put(model: torch.nn.Module, tensors: dict[str, torch.Tensor], layers: set[str], expected: set[str]) -> None:
    """Copy a tuner's tensors into the model; those of quantized layers are matrices [N, K].

    Raises:
        ValueError: other layers than the expected ones were quantized, or embeddings changed.
    """
    if layers != expected:
        raise ValueError(f"quantized by mistake or not at all: {sorted(layers ^ expected)[:3]}")
    quantized = {f"{name}.weight" for name in layers}
    for name, value in tensors.items():
        parameter = model.get_parameter(name).data
        if name not in quantized and parameter.dim() > 1:
            raise ValueError(f"{name} was changed; tables and heads stay as they are")
        parameter.copy_(value.to(parameter.dtype))


def to_file(figures: Figures, path: Path) -> None:
    """Keep figures, window by window."""
    document: dict[str, Any] = {"bits": figures.bits}
    document |= {name: getattr(figures, name).tolist() for name in ("kl", "top1", "loss")}
    path.write_text(json.dumps(document))


def from_file(path: Path) -> Figures:
    """What :func:`to_file` kept."""
    document = json.loads(path.read_text())
    return Figures(document["bits"], *(np.array(document[name]) for name in ("kl", "top1", "loss")))


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))
