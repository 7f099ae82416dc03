"""An encoder of pictures in parts: patches, their positions, blocks (graphs as vendors' pipelines read them).

Whoever asks gives pixels, as of any encoder of images; lists that the graphs read are made here, picture by picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from roundexport.runtime.picture_lists import PictureLists
from roundexport.runtime.types import EncoderBackend, Floats


class GridEncoder:
    """A tower that reads pictures of any size.

    Args:
        patches: the opened graph that embeds patches.
        positions: that of the table of positions, where there is one.
        merger: that of blocks and mergers.
        lists: makes what it reads beside hidden states.
        angles: that it reads of a patch.
    """

    def __init__(
        self,
        patches: EncoderBackend,
        positions: EncoderBackend | None,
        merger: EncoderBackend,
        lists: PictureLists,
        angles: int,
    ) -> None:
        self._patches, self._positions, self._merger = patches, positions, merger
        self._lists, self._angles = lists, angles

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, times of opening."""
        return self._merger.info()

    def output(self, inputs: Mapping[str, Any], vector: bool = False) -> Floats:
        """Features [B, N/m², F] of ``pixel_values`` [B, C, height, width]; there is no other vector."""
        return np.stack([self._features(pixels) for pixels in inputs["pixel_values"]])

    def _features(self, pixels: Floats) -> Floats:
        rows, columns = self._lists.grid(pixels)
        hidden = self._patches.output({"hidden_states": self._lists.patches(pixels)})
        if self._positions is not None:
            entries, shares = self._lists.corners(rows, columns)
            hidden = hidden + (self._positions.output({"input": entries}) * shares[..., None]).sum(0)
        return self._merger.output({"hidden_states": hidden, **self._lists.lists(rows, columns, self._angles)})
