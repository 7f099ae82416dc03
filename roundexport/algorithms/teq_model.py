"""TEQ as published: the factors of all blocks trained at once, end to end, on the model's own loss.

Pairs, factors, rounding and steps are teq.py's.  What differs:

    loss     KL of the rounded model's next-token distribution from the float one's, or, as in the paper, cross-entropy
             with the calibration text
    start    α = 1 everywhere
    memory   the whole model, its rounded weights and the activations of one batch for the backward pass: for models of
             which several copies fit

In: a decoder with its float weights, token ids, schemes.  Out: the model with other weights, and the norms and biases
that changed.  Limits: decoders.
Source: arXiv 2310.10944 (Adam, lr 1e-3, betas (0.9, 0.9), 1000 steps of one sample, cross-entropy).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from roundexport.blocks import Stack, capture_calls, first_hidden
from roundexport.errors import UsageError
from roundexport.folding import Pair, find_pairs
from roundexport.spec import QuantSpec

from ._equivalent import Rounded, Steps, best, check_steps, fold_in, mean, spread, train, useful

NEEDS_CALIBRATION = True
_STEP_COST = 4.2  # a step with its backward pass and the float logits, in forwards of its batch
_COMPARED = 2 * 2 * 16  # forwards of one sample that the comparison at the end takes


@dataclass(frozen=True)
class Settings:
    """How the factors are trained.

    Args:
        steps: steps over the whole model.
        batch_size: samples per step.
        learning_rate: Adam's, in log α.
        through_scale: let slopes through scales and zero points.
        loss: ``kl`` or ``cross_entropy``.

    Raises:
        UsageError: a value makes no sense.
    """

    steps: int = 100
    batch_size: int = 8
    learning_rate: float = 1e-2
    through_scale: bool = True
    loss: Literal["kl", "cross_entropy"] = "kl"

    def __post_init__(self) -> None:
        if self.loss not in ("kl", "cross_entropy"):
            raise UsageError(f"loss must be kl or cross_entropy, not {self.loss!r}")
        check_steps(self.steps, self.batch_size, self.learning_rate)

    def cost(self, samples: int) -> float:
        """Forwards over one sample, per block; a step counts as 4.2 forwards of its batch."""
        return _STEP_COST * self.steps * min(self.batch_size, samples) + _COMPARED


def train_model(
    model: nn.Module,
    stack: Stack,
    ids: Tensor,
    block_specs: Sequence[Mapping[str, QuantSpec]],
    settings: Settings,
    seed: int = 0,
    report: Callable[[float], None] = lambda done: None,
) -> list[Tensor]:
    """Logarithms of the best factors found, for :func:`fold_model`; all zeros where nothing helped.

    Args:
        model: a decoder with its float weights; not changed.
        stack: its blocks.
        ids: token ids [n, S] of calibration samples.
        block_specs: per block, scheme by the linear's name in the block.
        settings: steps and loss.
        seed: of the order of samples.
        report: called after every step with the share of the work that is done.

    Returns:
        θ [W], one tensor per pair, block after block.

    Raises:
        SpecError: a scheme does not fit its weight.
        RoundexportError: the loss is not a finite number.
    """
    pairs, device = _pairs(model, stack, ids, block_specs), next(model.parameters()).device

    def loss(thetas: Sequence[Tensor], batch: Tensor) -> Tensor:
        parameters: dict[str, Tensor] = {}
        own = _per_block(thetas, pairs)
        for index, (block, part, specs) in enumerate(zip(stack.blocks, pairs, block_specs, strict=True)):
            rounded = Rounded.of(block, part, own[index], specs, settings.through_scale)
            parameters.update(rounded.parameters(block, f"{stack.block_name(index)}."))
        return _loss(model, parameters, ids[batch].to(device), settings.loss)

    ones = [torch.zeros(pair.width, device=device) for part in pairs for pair in part]
    if not ones:
        return []
    steps, compared = Steps(settings.steps, settings.batch_size, settings.learning_rate, seed, report), spread(len(ids))
    trained = train(loss, ones, len(ids), steps)
    return best([ones, trained], lambda thetas: mean(loss, thetas, compared, settings.batch_size))


def fold_model(
    model: nn.Module,
    stack: Stack,
    ids: Tensor,
    block_specs: Sequence[Mapping[str, QuantSpec]],
    thetas: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Fold what :func:`train_model` returned, for the same model and samples, into the model's blocks, in place.

    Returns:
        What changed other than weights with a scheme, by parameter name in the model.
    """
    pairs = _pairs(model, stack, ids, block_specs)
    changed: dict[str, Tensor] = {}
    for index, own in enumerate(_per_block(thetas, pairs)):
        found = fold_in(stack.blocks[index], pairs[index], own, block_specs[index])
        changed.update({f"{stack.block_name(index)}.{name}": tensor for name, tensor in found.items()})
    return changed


def _pairs(
    model: nn.Module, stack: Stack, ids: Tensor, block_specs: Sequence[Mapping[str, QuantSpec]]
) -> list[list[Pair]]:
    """Pairs of every block; which fold does not depend on the hidden states, so those of the first block will do."""
    calls, hidden = capture_calls(model, stack, ids), first_hidden(model, stack, ids[:1], 1)
    found = [find_pairs(block, call, hidden) for block, call in zip(stack.blocks, calls, strict=True)]
    return [useful(part, specs) for part, specs in zip(found, block_specs, strict=True)]


def _per_block(thetas: Sequence[Tensor], pairs: Sequence[Sequence[Pair]]) -> list[list[Tensor]]:
    rest = iter(thetas)
    return [[next(rest) for _ in part] for part in pairs]


def _loss(model: nn.Module, parameters: dict[str, Tensor], ids: Tensor, kind: str) -> Tensor:
    """Nats per predicted token: KL from the float model, or cross-entropy with the text."""
    call = {"input_ids": ids, "use_cache": False}
    found = torch.log_softmax(torch.func.functional_call(model, parameters, kwargs=call).logits[:, :-1].float(), -1)
    if kind == "cross_entropy":
        return -found.gather(-1, ids[:, 1:, None]).mean()
    with torch.no_grad():
        wanted = torch.log_softmax(model(**call).logits[:, :-1].float(), -1)
    return (wanted.exp() * (wanted - found)).sum(-1).mean()
