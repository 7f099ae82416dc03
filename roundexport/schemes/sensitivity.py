"""How much the model loses when one layer is quantized by one scheme: the scores that a plan of bits is made from.

For a linear y = W x with rounded weight Wq, D = W - Wq, tokens t, and g = ∂loss/∂y:

    fisher       ½·Σ_t (g_t · D x_t)² / tokens         gradient at the float model
    delta_loss   Σ over batches of Σ_ij |G ∘ D|, G = Σ_t g_t x_tᵀ         gradient with all layers at that scheme

``fisher``: KL(float ‖ quantized) has no gradient at the float model, and its curvature is the Fisher matrix, the mean
of g gᵀ for labels drawn from the model's own distribution.  So one label is drawn per position, the loss is its
surprise, and the score is the layer's KL in nats per token to second order.  Scores of layers add up to the model's KL,
and those of 2 and of 8 bits are in the same unit, which the knapsack needs.  One backward pass serves all schemes.  For
an encoder, half the squared error of its last hidden states takes the place of KL, and random normal numbers that of
the drawn labels' gradient.

``delta_loss`` is SignRoundV2's, as published: first order, one backward pass per scheme, the loss being cross-entropy
of the sample itself, or an encoder's squared error against its float output.  Its unit is not the model's loss.

Which rounded weight: ``fisher`` takes one that is rounded as the recipe will.  For `gram`, and so for most recipes,
that is for the sums H of the layer's inputs (kernels/gram_rounding.py), of other samples than those it is scored on,
since few tokens flatter wide layers.  Nearest codes lose two to four times as much, and more in some layers and at some
widths than in others: plans from them spend bits where `gram` needs none.  Above 4 bits nearest codes do.
``delta_loss`` scores with grids searched for the inputs' second moments.

Memory and the backward pass by block: see blockwise_backward.py.  Token embedding and lm_head are measured, on the same
samples: see table_scores.py.  A linear that no token reached, as a routed expert's, gets the mean score of those of its
shape.
Source: Cheng et al. 2025, SignRoundV2, arXiv 2512.04746 (delta_loss); Kunstner et al. 2019, arXiv 1905.12558 (fisher).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, get_args

import torch
from torch import Tensor, nn

from roundexport.errors import UnsupportedError, UsageError
from roundexport.kernels import searched_rounding
from roundexport.model.blocks import linears, weight_of
from roundexport.model.blockwise_backward import BackwardSettings, BlockwiseBackward, open_backward
from roundexport.model.streamed_model import StreamedModel
from roundexport.quant.spec import QuantSpec

from . import gram_space
from .gram_space import GramSpace, nearest
from .settings import Rounding, Scoring
from .table_scores import Tables, table_losses

_SCORED = 8  # samples

Options = Mapping[str, Sequence[QuantSpec]]  # schemes to score, by module path


@dataclass(frozen=True)
class Scores:
    """What :func:`score` finds.

    Args:
        losses: one number per scheme by layer, at least 0; less is better.
        sharing: layers that read the very same input, as query, key and value do; those that share with none are left
            out.
    """

    losses: dict[str, tuple[float, ...]]
    sharing: tuple[tuple[str, ...], ...]


def score(
    weights: StreamedModel,
    ids: Tensor,
    options: Options,
    method: Scoring = "fisher",
    settings: BackwardSettings | None = None,
    rounding: Rounding = "gram",
    tables: Tables | None = None,
) -> Scores:
    """Score every scheme of every layer.

    Args:
        weights: the float model; not changed.
        ids: token ids [n, S].
        options: schemes by module path of linears in the blocks; as many for every layer, or one where it is settled.
        method: ``fisher`` or ``delta_loss``.
        settings: batch size, seed, device.
        rounding: of weights that ``fisher`` scores.
        tables: token embedding and lm_head, with ``fisher``.

    Returns:
        The scores, and which layers share an input.

    Raises:
        UsageError: an unknown method.
        UnsupportedError: the model cannot be run block by block.
        RoundexportError: inputs of a layer are not finite.
        SpecError: a scheme does not fit its layer.
    """
    if method not in get_args(Scoring):
        raise UsageError(f"unknown way to score layers {method!r}; known: {', '.join(get_args(Scoring))}")
    with open_backward(weights, ids, settings or BackwardSettings()) as model, torch.no_grad():
        moments, measured = model.forward(), dict[str, tuple[float, ...]]()
        if method == "delta_loss":
            found = _delta_loss(model, options, moments)
        else:
            model.set_aside(fitted(len(ids)) if rounding == "gram" else 0)
            if tables is not None:
                measured = table_losses(weights, model, tables)
            found = _fisher(model, options, moments, rounding)
    losses = _fill_unseen(found, {name: _shape(weights, name) for name in options})
    sharing = tuple(names for names in model.sharing.values() if len(names) > 1)
    return Scores({**losses, **measured}, sharing)


def constants() -> dict[str, Any]:
    """What decides scores beside what is asked for, as JSON values: a change of it makes other ones."""
    return {**gram_space.constants(), "scored": _SCORED}


def fitted(samples: int) -> int:
    """Of so many samples, how many weights are rounded for; the others are scored on."""
    return 0 if samples == 1 else samples - min(_SCORED, samples // 2)


def _fisher(
    model: BlockwiseBackward, options: Options, moments: Mapping[str, Tensor], rounding: Rounding
) -> dict[str, list[float] | None]:
    found: dict[str, list[float] | None] = dict.fromkeys(options)
    errors: dict[str, list[Tensor]] = {}

    def begin(block: nn.Module, prefix: str) -> None:
        errors.clear()
        modules = {f"{prefix}.{name}": module for name, module in linears(block).items()}
        weights = {path: weight_of(module).float() for path, module in modules.items() if path in options}
        if rounding == "gram":
            for paths, gram in model.input_sums(block, prefix).items():
                asked = {path: weights[path] for path in paths if path in weights}
                if asked:
                    errors.update(_errors_in_gram_space(asked, options, gram))
            return
        for path, weight in weights.items():
            rounded = (_each(weight, spec, moments[path], path, rounding) for spec in options[path])
            errors[path] = [_kept(weight - other) for other in rounded]

    def seen(path: str, x: Tensor, gradient: Tensor) -> None:
        if path in errors:
            terms = [float(((x @ error.float().t()) * gradient).sum(1).square().sum()) for error in errors[path]]
            before = found[path] or [0.0] * len(terms)
            found[path] = [a + b / (2 * model.ids.numel()) for a, b in zip(before, terms, strict=True)]

    model.backward(model.output_gradient(model.sampled_label_nll(), seen), seen, begin)
    return found


def _errors_in_gram_space(weights: Mapping[str, Tensor], options: Options, gram: Tensor) -> dict[str, list[Tensor]]:
    """What each scheme takes from weights [N, K] that share an input, rounded for its sums H; H is damped in place."""
    space = GramSpace(gram, next(iter(weights)))
    return {
        path: [_kept(weight - space.rounded(weight, spec)) for spec in options[path]]
        for path, weight in weights.items()
    }


def _each(weight: Tensor, spec: QuantSpec, importance: Tensor, where: str, rounding: Rounding) -> Tensor:
    if rounding == "searched":
        return _rounded(weight, spec, importance, where)
    return nearest(weight, spec)


def _kept(error: Tensor) -> Tensor:
    """Half the memory; a relative error of 1/256 of a difference is nothing."""
    return error.bfloat16()


def _delta_loss(
    model: BlockwiseBackward, options: Options, moments: Mapping[str, Tensor]
) -> dict[str, list[float] | None]:
    found: dict[str, list[float] | None] = dict.fromkeys(options)
    floats = model.outputs() if model.encoder else None
    for number in range(max(map(len, options.values()), default=0)):
        chosen = {path: specs[min(number, len(specs) - 1)] for path, specs in options.items()}
        replaced = _Replaced(chosen, moments)
        model.forward(replaced)
        sums: dict[str, float] = {}

        def seen(path: str, x: Tensor, gradient: Tensor, replaced: _Replaced = replaced, sums: Any = sums) -> None:
            if path in replaced.errors:
                change = ((gradient.t() @ x) * replaced.errors[path]).abs().sum()
                sums[path] = sums.get(path, 0.0) + float(change)

        gradient = model.output_gradient(model.data_loss(floats), seen)
        model.backward(gradient, seen, None, replaced)
        for path, value in sums.items():
            if number < len(options[path]):
                found[path] = [*(found[path] or []), value]
    return found


def _fill_unseen(
    found: Mapping[str, list[float] | None], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[float, ...]]:
    """Scores of all layers: those that no token reached get the mean of their shape."""
    seen: dict[tuple[int, ...], list[list[float]]] = {}
    for path, values in found.items():
        if values is not None:
            seen.setdefault(shapes[path], []).append(values)
    result = {}
    for path, values in found.items():
        if values is None:
            alike = seen.get(shapes[path])
            if alike is None:
                raise UnsupportedError(f"{path}: no token reaches it, nor any layer of its shape; give it a rule")
            values = [mean(column) for column in zip(*alike, strict=True)]  # noqa: PLW2901  (the mean in its place)
        result[path] = tuple(values)
    return result


class _Replaced:
    """Rounded weights in place of a block's own, made when the block's turn comes."""

    def __init__(self, chosen: Mapping[str, QuantSpec], moments: Mapping[str, Tensor]) -> None:
        self.errors: dict[str, Tensor] = {}
        self._chosen, self._moments = chosen, moments

    def of(self, block: nn.Module, prefix: str) -> dict[str, Tensor]:
        """The block's rounded weights by the linear's name; ``errors`` holds their differences by path."""
        self.errors.clear()
        modules = {name: module for name, module in linears(block).items() if f"{prefix}.{name}" in self._chosen}
        return {name: self._take(f"{prefix}.{name}", weight_of(module)) for name, module in modules.items()}

    def _take(self, path: str, weight: Tensor) -> Tensor:
        rounded = _rounded(weight, self._chosen[path], self._moments[path], path)
        self.errors[path] = weight - rounded
        return rounded


def _rounded(weight: Tensor, spec: QuantSpec, importance: Tensor, where: str) -> Tensor:
    rounded = searched_rounding.run(weight, spec, importance, where)
    return torch.from_numpy(rounded.dequantize()).to(weight.device)


def _shape(weights: StreamedModel, path: str) -> tuple[int, ...]:
    return tuple(weight_of(weights.model.get_submodule(path)).shape)
