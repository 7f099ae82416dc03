"""Towers that read pictures of any size: Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

    pixels [B, C, H, W] ─ patches ─ blocks [B, N, D] ─ merger ─ features [B, N/m², F]         N = H/p · W/p patches

transformers packs the patches of all pictures into one row and cuts it by lists of lengths, which a graph cannot.  Here
the pictures of a batch have one size, so they are a batch, and what transformers computes from lists follows from
height and width; or the lists are given (graph/grid_stages.py):

    patches     neighbors that are merged (m x m) stand together, squares row by row; a still picture fills both frames
                of a patch, so that its convolution is the one with the sum of both kernels
    angles      of a patch from its row and its column, half of the head each
    windows     Qwen2.5-VL: squares of w x w merged patches see each other; a mask [N, N] hides what others hold
    positions   Qwen3-VL: the learned square table at this height and width, by linear interpolation, corners aligned
    DeepStack   Qwen3-VL: what further mergers make of earlier blocks stands behind each feature, F = (1 + K) · H

Source: forward of the towers in transformers 5.23; held against them in tests/runtime/test_qwen_vl.py.
Limits: still pictures; a batch has pictures of one size, whose height and width are multiples of m · p.  Windows cost
what whole attention does.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

_TOWERS = (
    "Qwen2VisionTransformerPretrainedModel",
    "Qwen2_5_VisionTransformerPretrainedModel",
    "Qwen3VLVisionModel",
)
_LOWEST = torch.finfo(torch.float32).min


def is_grid_tower(tower: nn.Module) -> bool:
    """Whether a tower is read by this file."""
    return type(tower).__name__ in _TOWERS


class GridTower(nn.Module):
    """What runs a tower of transformers on pixels; its modules stay where they are.

    Args:
        tower: the tower, whose attention is replaced.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self._tower = (tower,)  # not a child: its parameters keep their names
        config: Any = tower.config
        self.merge, self.patch = int(config.spatial_merge_size), int(config.patch_size)
        windowed = hasattr(config, "fullatt_block_indexes")
        self._window = config.window_size // self.merge // self.patch if windowed else 0
        self._whole = set(config.fullatt_block_indexes) if windowed else set(range(len(tower.blocks)))  # type: ignore[arg-type]
        self._deep = {at: k for k, at in enumerate(getattr(config, "deepstack_visual_indexes", None) or ())}
        for block in tower.blocks:  # type: ignore[union-attr]
            block.attn = GridAttention(block.attn)

    @property
    def tower(self) -> Any:
        """The module of transformers."""
        return self._tower[0]

    @property
    def angles(self) -> int:
        """Angles of a patch."""
        return 2 * int(self.tower.rotary_pos_emb.inv_freq.numel())

    @property
    def windowed(self) -> bool:
        """Whether some blocks see windows only."""
        return bool(self._window)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features [B, N/m², F] of pixels [B, C, H, W]."""
        tower = self.tower
        embed = tower.patch_embed.proj
        hidden = nn.functional.conv2d(pixels, embed.weight.sum(2), embed.bias, stride=self.patch)
        width = hidden.shape[1]
        rows, columns = pixels.shape[2] // (self.merge * self.patch), pixels.shape[3] // (self.merge * self.patch)
        if hasattr(tower, "pos_embed"):
            hidden = hidden + _resampled(tower.pos_embed.weight, rows * self.merge, columns * self.merge)
        hidden = hidden.reshape(-1, width, rows, self.merge, columns, self.merge)
        hidden = hidden.permute(0, 2, 4, 3, 5, 1).reshape(-1, rows * columns * self.merge**2, width)
        down, across = self._places(rows, columns)
        return self.features(hidden, self._angles(down, across), None, self._windows(down, across))

    def embedded(self, patches: Tensor) -> Tensor:
        """Hidden states [N, D] of patches [N, C · frames · p · p]."""
        convolution = self.tower.patch_embed.proj
        return nn.functional.linear(patches, convolution.weight.flatten(1), convolution.bias)

    def features(self, hidden: Tensor, angles: Tensor, whole: Tensor | None, windows: Tensor | None) -> Tensor:
        """What blocks and mergers make of hidden states.

        Args:
            hidden: [B, N, D].
            angles: of every patch, [1, N, head width / 2].
            whole: what is added to scores of blocks that see everything, [1, 1, N, N]; None: nothing.
            windows: likewise of blocks that see windows.

        Returns:
            Features [B, N/m², F].
        """
        both = torch.cat([angles, angles], -1)
        turns = both.cos(), both.sin()
        deep: dict[int, Tensor] = {}
        for number, block in enumerate(self.tower.blocks):
            hidden_from = whole if number in self._whole else windows
            hidden = block(hidden, cu_seqlens=hidden_from, position_embeddings=turns)
            if number in self._deep:
                deep[self._deep[number]] = _merged(self.tower.deepstack_merger_list[self._deep[number]], hidden)
        return torch.cat([_merged(self.tower.merger, hidden), *(deep[at] for at in range(len(deep)))], -1)

    def _places(self, rows: int, columns: int) -> list[Tensor]:
        """Row and column of every patch, [N] each."""
        merge = self.merge
        down = torch.arange(rows * merge).reshape(rows, 1, merge, 1)
        across = torch.arange(columns * merge).reshape(1, columns, 1, merge)
        return [place.expand(rows, columns, merge, merge).reshape(-1) for place in (down, across)]

    def _angles(self, *places: Tensor) -> Tensor:
        """Angles [1, N, head width / 2] of every patch's row and column."""
        inverse = self.tower.rotary_pos_emb.inv_freq.float()
        return torch.cat([place[None, :, None].float() * inverse for place in places], -1)

    def _windows(self, *places: Tensor) -> Tensor | None:
        """What hides the patches of other windows, [1, 1, N, N]; None where there are no windows."""
        if not self._window:
            return None
        numbers = [torch.div(place, self._window * self.merge, rounding_mode="floor") for place in places]
        same = [number[:, None] == number[None] for number in numbers]
        return torch.where(same[0] & same[1], 0.0, _LOWEST)[None, None]


def _merged(merger: nn.Module, hidden: Tensor) -> Tensor:
    """Features [B, N/m², H]; the merger itself forgets what is a picture's."""
    found: Tensor = merger(hidden)
    return found.reshape(hidden.shape[0], -1, found.shape[-1])


def _resampled(table: Tensor, height: int, width: int) -> Tensor:
    """A square table [side², D] at another height and width, [1, D, height, width]."""
    side = int(table.shape[0] ** 0.5)
    down, across = (_hats(side, size) for size in (height, width))
    rows = down @ table.reshape(side, -1)  # [height, side · D]
    both = across @ rows.reshape(-1, side, table.shape[-1])  # [height, width, D]
    return both.permute(2, 0, 1)[None]


def _hats(side: int, size: int) -> Tensor:
    """Shares [size, side] of a table's entries in each of ``size`` places from its first to its last entry."""
    last = torch.sym_max(size - 1, 1)  # type: ignore[no-untyped-call]
    places = torch.arange(size).float() * ((side - 1) / last)
    shares: Tensor = (1 - (places[:, None] - torch.arange(side).float()).abs()).clamp(min=0)
    return shares


class GridAttention(nn.Module):
    """Attention of a tower's block over a batch of pictures of one size.

    Args:
        attention: transformers' module, whose linears are taken over.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj
        self.config, self.is_causal, self.num_key_value_groups = attention.config, False, 1
        self.heads, self.width, self.scaling = attention.num_heads, attention.head_dim, attention.head_dim**-0.5
        self._eager = sys.modules[type(attention).__module__].eager_attention_forward

    def forward(
        self, hidden: Tensor, cu_seqlens: Tensor | None, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> Tensor:
        """[B, N, D]; in the place of lists of lengths what hides the patches of other windows, [1, 1, N, N] or None."""
        packed = self.qkv(hidden).reshape(hidden.shape[0], -1, 3, self.heads, self.width)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self._eager)
        found, _ = attend(self, q, k, v, cu_seqlens, scaling=self.scaling, dropout=0.0, is_causal=False)
        return self.proj(found.reshape(hidden.shape[0], -1, self.heads * self.width))  # type: ignore[no-any-return]
