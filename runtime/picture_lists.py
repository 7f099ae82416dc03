"""What the graphs of a tower that reads pictures of any size are given: patches of a picture, and lists about them.

    pixels [C, H, W] ─ patches [N, C · frames · p · p] ─▶ hidden states ─┬─▶ features [N/m², F]
                                                  rotary_pos_emb, masks ─┘

    patches           squares of m x m merged ones row by row, inside a square row by row; frames are all the picture
    rotary_pos_emb    [N, A]: angles of a patch's row, then of its column, by base 10000
    attention_mask    [1, N, N], added to scores: 0, as a picture stands alone here and its patches see each other
    window_index      the order of merged patches in which windows of w x w of them stand together
    window_attention_mask    [1, N, N] in that order: -inf between windows
    corners, shares   [4, N]: entries of the learned square table around a patch's place, and what each counts

Source: openvino_genai's qwen2vl, qwen2_5_vl and qwen3_vl, which feed the same graphs with the same lists; transformers
5.23's towers.  Held against the latter in tests/runtime/test_qwen_vl.py.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from roundexport.errors import ArtifactError

from .types import Floats, Ids

_BASE = 10000.0


@dataclass(frozen=True)
class PictureLists:
    """Sizes that lists are made by.

    Args:
        patch: edge of a patch in pixels.
        merge: edge in patches of what becomes one feature.
        frames: of a patch.
        window: edge of a window in merged patches; 0: there are none.
        side: of the learned table of positions; 0: there is none.
    """

    patch: int
    merge: int
    frames: int
    window: int
    side: int

    def __post_init__(self) -> None:
        if min(self.patch, self.merge, self.frames) < 1 or min(self.window, self.side) < 0:
            raise ValueError(f"sizes that make no sense: {self}")

    @classmethod
    def read(cls, settings: Any, where: str) -> PictureLists:
        """What a manifest says.

        Args:
            settings: the sizes, by name.
            where: the file, for the error.

        Raises:
            ArtifactError: one is missing or makes no sense.
        """
        names = {field.name for field in fields(cls)}
        whole = isinstance(settings, dict) and all(type(value) is int for value in settings.values())
        if not whole or set(settings) != names:
            raise ArtifactError(f"{where}: sizes of pictures are whole numbers named {sorted(names)}, not {settings}")
        try:
            return cls(**settings)
        except ValueError as error:
            raise ArtifactError(f"{where}: {error}") from error

    def patches(self, pixels: Floats) -> Floats:
        """Patches [N, C · frames · p · p] of pixels [C, height, width]."""
        channels = len(pixels)
        rows, columns = self.grid(pixels)
        cut = pixels.reshape(channels, rows, self.merge, self.patch, columns, self.merge, self.patch)
        cut = cut.transpose(1, 4, 2, 5, 0, 3, 6).reshape(-1, channels, 1, self.patch**2)
        return np.ascontiguousarray(cut.repeat(self.frames, 2).reshape(len(cut), -1), np.float32)

    def grid(self, pixels: Floats) -> tuple[int, int]:
        """Rows and columns of merged patches."""
        unit = self.merge * self.patch
        return pixels.shape[-2] // unit, pixels.shape[-1] // unit

    def lists(self, rows: int, columns: int, angles: int) -> dict[str, Any]:
        """What goes beside hidden states of a picture of so many merged patches.

        Args:
            rows: of merged patches.
            columns: likewise.
            angles: of a patch.
        """
        down, across = self._places(rows, columns)
        inverse = 1 / _BASE ** (np.arange(angles // 2) / (angles // 2))
        turned = np.concatenate([place[:, None] * inverse for place in (down, across)], 1)
        found = {
            "rotary_pos_emb": turned.astype(np.float32),
            "attention_mask": np.zeros((1, len(down), len(down)), np.float32),
        }
        if not self.window:
            return found
        windows = (down // self.merge // self.window) * -(-columns // self.window) + across // self.merge // self.window
        merged = windows[:: self.merge**2]
        order = np.argsort(merged, kind="stable")
        sorted_windows = merged[order].repeat(self.merge**2)
        apart = sorted_windows[:, None] != sorted_windows
        return {
            **found,
            "window_attention_mask": np.where(apart, np.float32(-np.inf), np.float32(0))[None],
            "window_index": order.astype(np.int64),
        }

    def corners(self, rows: int, columns: int) -> tuple[Ids, Floats]:
        """Entries of the table around every patch, [4, N], and their shares; the table's corners are the picture's."""
        sides = []
        for place, size in zip(self._places(rows, columns), (rows * self.merge, columns * self.merge), strict=True):
            exact = place * ((self.side - 1) / max(size - 1, 1))
            low = np.floor(exact).astype(np.int64)
            high, part = np.minimum(low + 1, self.side - 1), exact - low
            sides.append(((low, 1 - part), (high, part)))
        pairs = [(vertical, horizontal) for vertical in sides[0] for horizontal in sides[1]]
        entries = np.stack([vertical[0] * self.side + horizontal[0] for vertical, horizontal in pairs])
        return entries, np.stack([vertical[1] * horizontal[1] for vertical, horizontal in pairs]).astype(np.float32)

    def _places(self, rows: int, columns: int) -> tuple[Ids, Ids]:
        """Row and column of every patch, in their order."""
        whole = np.indices((rows, self.merge, columns, self.merge), np.int64)
        down, across = whole[0] * self.merge + whole[1], whole[2] * self.merge + whole[3]
        return down.transpose(0, 2, 1, 3).reshape(-1), across.transpose(0, 2, 1, 3).reshape(-1)
