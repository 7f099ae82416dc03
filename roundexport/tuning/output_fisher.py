"""What an error of every linear's outputs costs the model: sums S over calibration tokens, one block at a time.

    S = Σ g gᵀ/|g|        g [N] = gradient, in the outputs of a linear, of the surprise of a label drawn from the model

Labels drawn from the model make E[g gᵀ] the Fisher matrix, to which the KL of a small change is its square.  A few
tokens have gradients a hundred times as large as a usual one's and would be all that is seen; over |g| each counts by
its size and not by its square.  A decoder's first token is left out: in many models all attention rests on it when
there is nothing to look at, so its gradients are of another kind (kernels/two_sided.py says how S is used).
An encoder has no labels; its loss is the last hidden states, or the logits of its head, times normal numbers.

A weight of many rows gets S of parts of its rows alone: [N, R], where the rows of a part hold their own square.

In: the float model, token ids.  Out: S by block, for who rounds it.  Cost: a forward and a backward pass of the
samples, and N·R operations per token.  Limits: the model runs block by block (model/blockwise_backward.py); experts
are left out, as each sees tokens of its own.  Sources: as of kernels/two_sided.py, and Kunstner et al., arXiv
1905.12558 (why labels must be drawn from the model).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from roundexport.algorithms.parts import fisher_parts
from roundexport.errors import RoundexportError
from roundexport.model.blockwise_backward import BackwardSettings, open_backward
from roundexport.model.experts import Experts
from roundexport.model.streamed_model import StreamedModel

if TYPE_CHECKING:
    from roundexport.schemes.layer_plan import Plan

ENOUGH_TOKENS = 4096  # 2,048 made two of three models worse (decision 0076)
Write = Callable[[int, Mapping[str, Tensor]], None]
"""Takes the number of a block, and S [N, R] by the linear's name in it."""


def rows_of(plan: Plan) -> dict[str, int]:
    """Linears of the blocks that are to be rounded, experts left out, by module path, with their rows N."""
    found, rows = {}, {info.name: info.out_features for info, _ in plan.layers}
    for index, block in enumerate(plan.stack.blocks):
        experts = tuple(f"{name}." for name, module in block.named_modules() if isinstance(module, Experts))
        for name in plan.block_specs[index]:
            if not name.startswith(experts):
                path = f"{plan.stack.block_name(index)}.{name}"
                found[path] = rows[path]
    return found


def values(rows: int) -> int:
    """Numbers in S of a linear with so many rows."""
    return rows * len(fisher_parts(rows)[0])


def behind_factors(sums: Mapping[str, Tensor], row_factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """S of outputs that a transform multiplied: y' = d·y has the gradient g' = g/d.  Tokens weigh what they did.

    Args:
        sums: S [N, R] by the linear's name in the block.
        row_factors: d [N]; where it is missing, 1.
    """
    found = dict(sums)
    for name in found.keys() & row_factors.keys():
        inverse, total = row_factors[name].reciprocal(), found[name].clone()
        for part in fisher_parts(len(total)):
            own = slice(part.start, part.stop)
            total[own, : len(part)] *= inverse[own, None] * inverse[own]
        found[name] = total
    return found


def measure(
    weights: StreamedModel, ids: Tensor, rows: Mapping[str, int], settings: BackwardSettings, write: Write
) -> None:
    """Measure S of every linear, from the last block to the first.

    Args:
        weights: the float model.
        ids: calibration samples [n, S].
        rows: linears of which S is wanted, by module path, with their N.
        settings: batch size, seed, device, progress.
        write: called once a block is done.

    Raises:
        UnsupportedError: the model cannot be run block by block.
        RoundexportError: a gradient is not a finite number.
    """
    stack = weights.stack
    number = {stack.block_name(index): index for index in range(len(stack.blocks))}
    sums: dict[str, Tensor] = {}
    prefixes: list[str] = []
    first = 1 if weights.checkpoint.task == "generate" else 0

    def done() -> None:
        if prefixes:
            own = {path.removeprefix(f"{prefixes[-1]}."): _finite(path, value) for path, value in sums.items()}
            write(number[prefixes[-1]], own)
        sums.clear()

    def begin(_: nn.Module, prefix: str) -> None:
        done()
        prefixes.append(prefix)

    def seen(path: str, x: Tensor, gradient: Tensor) -> None:
        del x
        if path not in rows or len(gradient) % ids.shape[1]:  # what does not see every token is rounded row by row
            return
        tokens = gradient.float().view(-1, ids.shape[1], rows[path]).clone()
        tokens[:, :first] = 0  # and not cut off: products of such sizes are the same bits for any number of threads
        tokens = tokens.flatten(0, 1)
        # over the root of |g| on either side; a token with next to no gradient adds nothing
        tokens /= tokens.square().sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny).pow(0.25)
        parts = fisher_parts(rows[path])
        total = sums.setdefault(path, tokens.new_zeros(rows[path], len(parts[0])).cpu())
        for part in parts:
            own = tokens[:, part.start : part.stop]
            total[part.start : part.stop, : len(part)].add_((own.t() @ own).cpu())

    with open_backward(weights, ids, settings) as model, torch.no_grad():
        model.forward()
        model.backward(model.output_gradient(model.sampled_label_nll(), seen), seen, begin)
        done()


def _finite(path: str, value: Tensor) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise RoundexportError(f"gradients of {path} are not finite numbers; the model is unusable")
    return value
