"""Rotary embeddings whose angles depend on the length of the text, and the one set of angles that a package gets.

    LongRoPE   angle = position · inv_freq / factor     one list of factors up to the original length, another beyond
    dynamic    angle = position · base(L)^(-2i/D)       L the length of the text; plain rotary up to the original length

transformers chooses anew at every pass.  A cache of rotated keys cannot follow: keys written below the original length
keep their angles when a running text crosses it, and rows of one batch would decide for each other.  So one set is
chosen at export: the one that transformers takes for a text of ``max_context`` tokens.

    max_context ≤ original length   the set of short texts; equal to transformers at every length the package serves
    max_context > original length   the set of long texts at every length; only where asked for, and said in a note

Without a wish ``max_context`` is the original length, also said in a note.  Where a running text crosses it,
transformers does one of two things: Phi-3's `generate` computes the whole cache again with the long factors, which is
what a package of the second kind gives; every other class goes on with keys of both kinds, as no package does.

Source: transformers, modeling_rope_utils.py (`dynamic_rope_update`); LongRoPE, arXiv 2402.13753.
Limits: classes that choose by code of their own, and not through that function, are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from roundexport.errors import UnsupportedError, UsageError
from roundexport.model.positions import positions_of_config

_CHOSEN = "default"  # a kind that transformers does not touch any more


@dataclass(frozen=True)
class RotaryLength:
    """What was chosen.

    Args:
        max_context: positions of the package.
        notes: sentences that the user must read.
    """

    max_context: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Dependent:
    """One rotary embedding whose angles depend on the length; ``layer_type`` where its module holds several."""

    module: nn.Module
    layer_type: str | None
    kind: str
    original: int
    limit: int


def choose_angles(model: nn.Module, max_context: int | None) -> RotaryLength:
    """Give every rotary embedding of the model one set of angles, in place.

    Args:
        model: a transformers model; changed where its angles depend on the length of the text.
        max_context: longest sequence to serve; None: the model's own limit, or the original length where angles change
            beyond it.

    Raises:
        UsageError: more positions than the model was made for.
        UnsupportedError: angles that still depend on the length afterwards.
    """
    positions = positions_of_config(model.config)
    dependent = list(_dependent(model, positions))
    limit = min((one.limit for one in dependent), default=positions)
    original = min((one.original for one in dependent), default=limit)
    chosen = max_context or min(limit, original)
    if chosen > limit:
        raise UsageError(f"max_context {chosen} is beyond the {limit} positions of the model")
    for one in dependent:
        _freeze(one, chosen)
    notes = dict.fromkeys(_note(one, chosen, max_context) for one in dependent if one.original < limit)
    return RotaryLength(chosen, tuple(note for note in notes if note))


def _dependent(model: nn.Module, positions: int) -> Iterator[_Dependent]:
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        parameters = getattr(getattr(module, "config", None), "rope_parameters", None)
        if not isinstance(parameters, dict):
            continue
        for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            settings = parameters if layer_type is None else parameters[layer_type]
            if kind == "longrope":
                yield _Dependent(module, layer_type, kind, int(settings["original_max_position_embeddings"]), positions)
            elif isinstance(kind, str) and "dynamic" in kind:
                limit = int(positions * max(1.0, float(settings.get("factor") or 1.0)))
                yield _Dependent(module, layer_type, kind, positions, limit)


def _freeze(one: _Dependent, length: int) -> None:
    """Let the module choose for a text of this length, then never again."""
    _angles(one, [length - 1])
    if one.layer_type is None:
        one.module.rope_type = _CHOSEN  # type: ignore[assignment]
    else:
        one.module.rope_type[one.layer_type] = _CHOSEN  # type: ignore[index, operator, assignment]
    # The embedding itself is asked whether that took effect: position 1 in a short and in the longest text.
    short, long = _angles(one, [1, 0]), _angles(one, [1, length - 1])
    if not torch.equal(short[0], long[0]):
        raise UnsupportedError(
            f"{type(one.module).__name__}: its angles depend on the length of the text in a way of its own; a KV cache "
            "cannot follow that"
        )


def _angles(one: _Dependent, positions: list[int]) -> torch.Tensor:
    """Cosines and sines [positions, 2·D]."""
    kwargs = {} if one.layer_type is None else {"layer_type": one.layer_type}
    with torch.no_grad():
        cos, sin = one.module(torch.zeros(1), torch.tensor([positions]), **kwargs)
    return torch.cat([cos, sin], -1)[0]


def _note(one: _Dependent, chosen: int, asked: int | None) -> str | None:
    long = one.kind == "longrope"
    name = "LongRoPE" if long else "dynamic rotary scaling"
    if chosen > one.original:
        others = f"texts of up to {one.original} tokens" if long else "texts of any other length"
        return (
            f"{name}: this package turns positions at every length as transformers does for a text of {chosen} tokens; "
            f"transformers turns {others} otherwise, so on those the package differs from it"
        )
    if asked is None:
        return (
            f"{name}: max_context is {chosen}, where the model's angles change; up to {one.limit} can be asked for "
            "(--max-context), with the angles of long texts at every length"
        )
    return None
