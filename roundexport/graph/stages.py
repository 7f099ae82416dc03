"""A decoder cut behind its table of tokens: two programs, so that other vectors can stand among those of the tokens.

    embedding    input_ids [B, S]                                            ──▶ inputs_embeds [B, S, H]
    language     inputs_embeds [B, S, H], attention_mask, position_ids      ──▶ logits [B, S, V]

What is read as pictures enters between them: a row of `inputs_embeds` is a token's or a picture's.  The cut is where
transformers' own ``inputs_embeds`` argument is: a scale inside the embedding module is in the first program, whatever
the model's forward does to vectors before its blocks in the second.

Positions of several axes (M-RoPE: time, height, width) are an input [3, B, S] here, as pictures stand among the
vectors.  Where features are added behind the first K blocks too (DeepStack), they stand behind each vector, and
inputs_embeds is [B, S, (1 + K) · H]; behind tokens are zeros.

Limits: models that look at token ids beside the vectors (Gemma 3n's tables for each layer) cannot be cut so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from roundexport.errors import UnsupportedError
from roundexport.types import EMBEDS

from .attention import AttentionTrace
from .states import StateTrace
from .tracing import DecoderCall, export_module

if TYPE_CHECKING:
    from roundexport.model.checkpoint import Checkpoint

Stage = Literal["embedding", "language"]
"""Which of the two programs."""
STAGES: tuple[Stage, ...] = ("embedding", "language")
_BATCH, _NEW, _PAST = 2, 5, 7


def check_stages(checkpoint: Checkpoint) -> None:
    """Refuse to cut a model that has no such place.

    Raises:
        UnsupportedError: it is not a decoder.
    """
    if checkpoint.task != "generate":
        raise UnsupportedError(
            f"{checkpoint.location}: {EMBEDS} are an input of decoders; this model's task is {checkpoint.task}"
        )


class _Embedding(nn.Module):
    def __init__(self, model: nn.Module, deep: int) -> None:
        super().__init__()
        self.model, self.deep = model, deep

    def forward(self, input_ids: Tensor) -> Tensor:
        rows: Tensor = self.model.get_input_embeddings()(input_ids)  # type: ignore[operator]
        return torch.cat([rows, *[torch.zeros_like(rows)] * self.deep], -1) if self.deep else rows


class _Language(DecoderCall):
    def __init__(self, model: nn.Module, trace: AttentionTrace, states: StateTrace, deep: int) -> None:
        super().__init__(model, trace, states)
        self.deep = deep

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        if self.deep:
            inputs_embeds, *deep = inputs_embeds.chunk(1 + self.deep, -1)
            self.more = {**self.more, "visual_pos_masks": None, "deepstack_visual_embeds": deep}
        return self.logits(attention_mask, position_ids, inputs_embeds=inputs_embeds)


def _axes(model: nn.Module) -> int:
    """Axes of positions, where there are several; else 0."""
    rope: Any = getattr(model.config, "rope_parameters", None)
    return len(rope["mrope_section"]) if isinstance(rope, dict) and rope.get("mrope_section") else 0


def trace_stage(
    model: nn.Module, trace: AttentionTrace, states: StateTrace, stage: Stage, deep: int = 0
) -> tuple[torch.export.ExportedProgram, tuple[str, ...], str]:
    """Export one of the programs with dynamic batch and lengths.

    Args:
        model: with its placeholders in place.
        trace: of its attention; filled by the language program.
        states: of what else it carries from token to token; likewise.
        stage: which.
        deep: blocks behind which features are added.

    Returns:
        The program, the names of its inputs, and that of its output.

    Raises:
        UnsupportedError: it cannot be traced; the text names the place and the reason.
    """
    ids = torch.zeros(_BATCH, _NEW, dtype=torch.long)
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        rows = torch.zeros_like(table(ids)).repeat(1, 1, 1 + deep)
    wrapper: nn.Module = _Embedding(model, deep) if stage == "embedding" else _Language(model, trace, states, deep)
    places, axes = torch.arange(_PAST, _PAST + _NEW).expand(_BATCH, _NEW).clone(), _axes(model)
    samples = {
        "input_ids": ids,
        EMBEDS: rows,
        "attention_mask": torch.ones(_BATCH, _NEW + _PAST, dtype=torch.long),
        "position_ids": places.repeat(axes, 1, 1) if axes else places,
    }
    inputs = ("input_ids",) if stage == "embedding" else (EMBEDS, "attention_mask", "position_ids")
    dynamic = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in inputs}
    if axes and "position_ids" in dynamic:
        dynamic["position_ids"] = {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    program = export_module(wrapper, {name: samples[name] for name in inputs}, dynamic, trace, states)
    return program, inputs, EMBEDS if stage == "embedding" else "logits"
