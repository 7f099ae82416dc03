"""TEQ as published: the factors of all blocks trained at once, end to end, on the model's own loss.

Pairs, factors, rounding and training steps are those of teq.py.  Differences:

    loss     KL of the rounded model's next-token distribution from the float one's, or, as in the paper, cross-entropy
             with the calibration text
    start    α = 1 everywhere
    memory   the whole model, its rounded weights and the activations of one batch: several copies of the model must fit
             (TeqModelSettings.whole_model_floats)

In: a decoder with its float weights, token ids, schemes.  Out: log α of every block.  `fold_block` folds them into one
block at a time and returns the norms and biases that changed.  Limits: decoders.
Source: arXiv 2310.10944 (Adam, lr 1e-3, betas (0.9, 0.9), 1000 steps of one sample, cross-entropy).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from roundexport.algorithms.common.scaling_training import (
    COMPARED_SAMPLES,
    Rounded,
    Steps,
    best,
    check_steps,
    fold_in,
    mean,
    train,
    useful,
)
from roundexport.algorithms.interface import BlockInputs, Factors, ModelTransform, Transformed
from roundexport.calibration.evenly_spread import evenly_spread
from roundexport.errors import RoundexportError, UsageError
from roundexport.model.block_call import capture_calls, first_hidden, without_cache
from roundexport.model.blocks import Stack
from roundexport.model.channel_scaling import Pair, find_pairs
from roundexport.quant.spec import QuantSpec

# A step with its backward pass and the float logits, in forwards of its batch through the model: CPU time on
# samples/model, one thread, 8 samples of 512 tokens, 4 bits symmetric, groups of 128; 4.9 asymmetric.
_STEP_COST = 5.1
_COMPARED = 2 * 2 * 16  # forwards of one sample that the comparison at the end takes


@dataclass(frozen=True)
class TeqModelSettings:
    """How the factors are trained.

    Args:
        steps: steps over the whole model.
        batch_size: samples per step.
        learning_rate: Adam's, in log α.
        through_scale: let gradients through scales and zero points.
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

    def forward_passes(self, samples: int) -> float:
        """Forwards of the model over one sample; a step counts as 5.1 forwards of its batch."""
        return _STEP_COST * self.steps * min(self.batch_size, samples) + _COMPARED

    def whole_model_floats(self, weights: int, outputs: int, vocabulary: int, length: int) -> float:
        """Float32 values held at most, beside the model.

        Args:
            weights: of all linears in blocks.
            outputs: their rows.
            vocabulary: rows of the head.
            length: tokens per sample.
        """
        # Measured on samples/model, 1 and 8 samples of 256 tokens: 10 and 28 values per weight; this says 11 and 35.
        return 8.0 * weights + (2.0 * outputs + 5.0 * vocabulary) * self.batch_size * length


def train_model(
    model: nn.Module,
    stack: Stack,
    ids: Tensor,
    block_specs: Sequence[Mapping[str, QuantSpec]],
    settings: TeqModelSettings,
    seed: int = 0,
    report: Callable[[float], None] = lambda done: None,
) -> Factors:
    """Train log α of all blocks, for :func:`fold_block`; all zeros where training did not lower the loss.

    Args:
        model: a decoder with its float weights; not changed.
        stack: its blocks.
        ids: token ids [n, S] of calibration samples.
        block_specs: per block, scheme by the linear's name in the block.
        settings: steps and loss.
        seed: of the order of samples.
        report: called after every step with the share of the work that is done.

    Returns:
        θ [W] by the pair's name, and the loss over the compared samples without and with them.

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
    steps = Steps(settings.steps, settings.batch_size, settings.learning_rate, seed, report)
    compared = evenly_spread(len(ids), COMPARED_SAMPLES)
    trained = train(loss, ones, len(ids), steps) if ones else ones
    chosen, before, after = best([ones, trained], lambda thetas: mean(loss, thetas, compared, settings.batch_size))
    blocks = {
        index: {_name(pair): theta.float().cpu() for pair, theta in zip(pairs[index], own, strict=True)}
        for index, own in enumerate(_per_block(chosen, pairs))
    }
    return Factors(blocks, before, after)


def fold_block(
    block: nn.Module, inputs: BlockInputs, specs: Mapping[str, QuantSpec], factors: Mapping[str, Tensor]
) -> Transformed:
    """Fold a block's factors, as :func:`train_model` returned them, in, in place.

    Args:
        block: the block with its float weights, on ``inputs.device``.
        inputs: hidden states.
        specs: scheme by the linear's name in the block.
        factors: θ by the pair's name.

    Returns:
        What changed other than weights with a scheme, by parameter name in the block.

    Raises:
        RoundexportError: a pair that was trained is none in this block.
    """
    found = find_pairs(block, inputs.call, inputs.float_inputs[:1].to(inputs.device)) if factors else ()
    pairs = [pair for pair in found if _name(pair) in factors]
    missing = factors.keys() - {_name(pair) for pair in pairs}
    if missing:
        raise RoundexportError(f"{min(missing)}: factors were trained that do not fold into this block; use teq")
    return fold_in(block, pairs, [factors[_name(pair)].to(inputs.device) for pair in pairs], specs)


def _pairs(
    model: nn.Module, stack: Stack, ids: Tensor, block_specs: Sequence[Mapping[str, QuantSpec]]
) -> list[list[Pair]]:
    """Pairs of every block, detected on the same hidden states as in :func:`fold_block`."""
    calls, hidden = capture_calls(model, stack, ids), first_hidden(model, stack, ids[:1], 1)
    found = []
    with torch.no_grad():
        for block, call, specs in zip(stack.blocks, calls, block_specs, strict=True):
            found.append(useful(find_pairs(block, call, hidden), specs))
            hidden = call.run(block, hidden)
    return found


def _name(pair: Pair) -> str:
    return f"{pair.producer}[{pair.start}:{pair.start + pair.width}]"


def _per_block(thetas: Sequence[Tensor], pairs: Sequence[Sequence[Pair]]) -> list[list[Tensor]]:
    rest = iter(thetas)
    return [[next(rest) for _ in part] for part in pairs]


def _loss(model: nn.Module, parameters: dict[str, Tensor], ids: Tensor, kind: str) -> Tensor:
    """Nats per predicted token: KL from the float model, or cross-entropy with the text."""
    call = {"input_ids": ids, **without_cache(model)}
    found = torch.log_softmax(torch.func.functional_call(model, parameters, kwargs=call).logits[:, :-1].float(), -1)
    if kind == "cross_entropy":
        return -found.gather(-1, ids[:, 1:, None]).mean()
    with torch.no_grad():
        wanted = torch.log_softmax(model(**call).logits[:, :-1].float(), -1)
    return (wanted.exp() * (wanted - found)).sum(-1).mean()


METHOD = ModelTransform(TeqModelSettings, train_model, fold_block)
