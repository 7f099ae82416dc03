"""What the model loses when token embedding or lm_head alone is rounded: measured, in the unit of layers' scores.

    lm_head             its product once more, on the last hidden states of the float model
    token embedding     a forward with its rounded rows
    one shared weight   both at once: rounded rows in, rounded product out

    loss = KL(float ‖ rounded), mean over the tokens; of an encoder half the squared error of its output

Tables are few, and there is nothing between lm_head and the loss: measuring takes less than a backward pass, and holds
at any size of the error.

They are rounded to nearest, as recipes round tables; at few bits the one that lm_head reads is rounded for the sums H
of what enters it where the method does so (tuning/head_rounding.py), on other samples than those it is measured on.

In: the float model while its layers are scored.  Out: losses by table and scheme.  Limits: a second copy of lm_head is
in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from roundexport.model.blockwise_backward import BlockwiseBackward
from roundexport.model.streamed_model import StreamedModel
from roundexport.quant.spec import LinearInfo, QuantSpec

from .gram_space import GramSpace, nearest

Rounds = Callable[[Tensor, QuantSpec], Tensor]
_ROWS = 1 << 12  # of a table that are rounded at a time


@dataclass(frozen=True)
class Tables:
    """Token embedding and lm_head, as they are to be scored.

    Args:
        infos: one of a weight that both share.
        options: schemes by the table's name.
        fitted: at few bits, lm_head is rounded for what enters it.
    """

    infos: tuple[LinearInfo, ...]
    options: Mapping[str, Sequence[QuantSpec]]
    fitted: bool


def table_losses(weights: StreamedModel, model: BlockwiseBackward, tables: Tables) -> dict[str, tuple[float, ...]]:
    """What every scheme of every table loses.

    Args:
        weights: the float model.
        model: the same, run forward, with the samples set aside that H is taken from.
        tables: what is scored.

    Raises:
        UnsupportedError: lm_head is not called as a module.
        RoundexportError: what enters it is not finite.
    """
    found: dict[str, tuple[float, ...]] = {}
    for info in tables.infos:
        names = {info.name, *info.shared_with}
        is_head, specs = model.head_name in names, tables.options[info.name]
        rounds = GramSpace(model.head_input_sums(), "lm_head").rounded if is_head and tables.fitted else nearest
        states: list[Tensor | None] = [None] * len(specs)
        if weights.embedding_name in {f"{name}.weight" for name in names}:
            states = [*_behind_rounded_rows(weights, model, [_by_rows(rounds, spec) for spec in specs])]
        losses = []
        for spec, hidden in zip(specs, states, strict=True):
            head = {f"{model.head_name}.weight": _by_rows(rounds, spec)(model.head_weight())} if is_head else {}
            losses.append(model.output_loss(hidden, head))
        found[info.name] = tuple(losses)
    return found


def _behind_rounded_rows(
    weights: StreamedModel, model: BlockwiseBackward, rounds: Sequence[Callable[[Tensor], Tensor]]
) -> list[Tensor]:
    """Last hidden states by each rounding of the token embedding, of which the rows that are needed are in memory."""
    name = str(weights.embedding_name)
    rows, entering = weights.model.get_parameter(name).detach(), []
    for rounded in rounds:
        with weights.replaced({name: rounded(rows)}):
            entering.append(model.embedded())
    return model.through_blocks(entering)


def _by_rows(rounds: Rounds, spec: QuantSpec) -> Callable[[Tensor], Tensor]:
    return lambda weight: torch.cat([rounds(part.float(), spec) for part in torch.split(weight, _ROWS)])
