"""A tower that reads pictures of any size, cut where vendors' pipelines cut it: programs that read lists, not pixels.

    patches     hidden_states [N, C · frames · p · p]                     ──▶ [N, D]
    positions   input [4, N], entries of the learned table (Qwen3-VL)     ──▶ [4, N, D], summed and added outside
    merger      hidden_states [N, D], rotary_pos_emb [N, head width / 2], attention_mask [1, N, N]
                and of a tower with windows window_attention_mask [1, N, N], window_index [N/m²]
                                                                          ──▶ features [N/m², F]

N patches of all pictures of a prompt stand one behind the other, m x m neighbors together.  The masks are added to
scores: 0 where a patch sees another, -inf elsewhere.  ``window_index`` is the order of merged patches in which windows
stand together; the window mask is in that order, features come out in the order of the patches.

Source: names and shapes are those that openvino_genai 2026.4 feeds (src/cpp/src/visual_language/qwen2vl, qwen2_5_vl and
qwen3_vl of its repository) and optimum-intel writes; the lists are made by runtime/picture_lists.py.
Limits: a patch has `temporal_patch_size` frames, which a still picture fills with itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .attention import AttentionTrace
from .states import StateTrace
from .tracing import export_module

if TYPE_CHECKING:
    from roundexport.model.grid_tower import GridTower

GridStage = Literal["patches", "positions", "merger"]
"""Which of the programs."""
_UNITS = 22  # any number of merged patches
_HIDDEN = "hidden_states"


def grid_sizes(config: Any) -> dict[str, int]:
    """What lists are made by, see PictureLists of the runtime, from the whole model's config.

    Args:
        config: transformers' config, with its defaults.
    """
    vision = config.vision_config
    patch, merge = int(vision.patch_size), int(vision.spatial_merge_size)
    return {
        "patch": patch,
        "merge": merge,
        "frames": int(vision.temporal_patch_size),
        "window": int(getattr(vision, "window_size", 0)) // merge // patch,
        "side": round(getattr(vision, "num_position_embeddings", 0) ** 0.5),
    }


def grid_stages(config: Any) -> tuple[GridStage, ...]:
    """The programs of a tower, the one that gives features last."""
    return ("patches", "positions", "merger") if grid_sizes(config)["side"] else ("patches", "merger")


class _Stage(nn.Module):
    """A part of a tower."""

    def __init__(self, model: nn.Module, trace: AttentionTrace) -> None:
        super().__init__()
        self.model, self.trace = model, trace

    @property
    def grid(self) -> GridTower:
        """What runs the tower."""
        return self.model.grid  # type: ignore[return-value]


class _Patches(_Stage):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.grid.embedded(hidden_states)


class _Positions(_Stage):
    def forward(self, input: Tensor) -> Tensor:
        table: Tensor = self.grid.tower.pos_embed.weight
        return table.index_select(0, input.reshape(-1)).reshape(4, -1, table.shape[1])


class _Merger(_Stage):
    def forward(self, hidden_states: Tensor, rotary_pos_emb: Tensor, attention_mask: Tensor) -> Tensor:
        self.trace.start()
        angles = rotary_pos_emb.reshape(1, -1, self.grid.angles)  # a front end may know the input's rank alone
        return self.grid.features(hidden_states[None], angles, attention_mask[None], None)[0]


class _WindowedMerger(_Stage):
    def forward(
        self,
        hidden_states: Tensor,
        rotary_pos_emb: Tensor,
        attention_mask: Tensor,
        window_attention_mask: Tensor,
        window_index: Tensor,
    ) -> Tensor:
        self.trace.start()
        hidden, angles = (self._ordered(rows, window_index)[None] for rows in (hidden_states, rotary_pos_emb))
        found = self.grid.features(hidden, angles, attention_mask[None], window_attention_mask[None])[0]
        return found.index_select(0, torch.argsort(window_index))

    def _ordered(self, rows: Tensor, order: Tensor) -> Tensor:
        """Rows of patches, those of a merged patch together, in the order of windows."""
        merged = rows.reshape(-1, self.grid.merge**2, rows.shape[-1])
        return merged.index_select(0, order).reshape(-1, rows.shape[-1])


def trace_grid(
    model: nn.Module, trace: AttentionTrace, stage: GridStage
) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """Export one of the programs with any number of patches.

    Args:
        model: the image side, with its placeholders in place.
        trace: of its attention; filled by the merger.
        stage: which.

    Returns:
        The program, and the names of its inputs.

    Raises:
        UnsupportedError: it cannot be traced; the text names the place and the reason.
    """
    grid: GridTower = model.grid  # type: ignore[assignment]
    tower, square = grid.tower, grid.merge**2
    units = torch.export.Dim("units")
    count, many = _UNITS * square, square * units
    kernel = tower.patch_embed.proj.weight
    if stage == "patches":
        wrapper: nn.Module = _Patches(model, trace)
        given: dict[str, tuple[Tensor, dict[int, Any]]] = {
            _HIDDEN: (torch.zeros(count, kernel[0].numel()), {0: torch.export.Dim.DYNAMIC})
        }
    elif stage == "positions":
        wrapper = _Positions(model, trace)
        given = {"input": (torch.zeros(4, count, dtype=torch.long), {1: torch.export.Dim.DYNAMIC})}
    else:
        wrapper = _WindowedMerger(model, trace) if grid.windowed else _Merger(model, trace)
        given = {
            _HIDDEN: (torch.zeros(count, kernel.shape[0]), {0: many}),
            "rotary_pos_emb": (torch.zeros(count, grid.angles), {0: many}),
            "attention_mask": (torch.zeros(1, count, count), {1: many, 2: many}),
        }
        if grid.windowed:
            mask = torch.zeros(1, count, count)  # of its own: one tensor given twice would be one input
            given |= {
                "window_attention_mask": (mask, {1: many, 2: many}),
                "window_index": (torch.arange(_UNITS), {0: units}),
            }
    samples, dynamic = ({name: pair[at] for name, pair in given.items()} for at in range(2))
    return export_module(wrapper, samples, dynamic, trace, StateTrace()), tuple(given)
