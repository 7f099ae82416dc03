"""A folder whose weights are floats of 4 or 8 bits, as if it were a float one: each is widened when it is read.

    file        experts.gate_up_proj_blocks, experts.gate_up_proj_scales      MXFP4, mxfp4.py
                q_proj.weight F8_E4M3, q_proj.weight_scale_inv                FP8 with a scale per block, block_fp8.py
    here        experts.gate_up_proj, q_proj.weight                           float32

Such floats are what some models are published in and trained for (gpt-oss, DeepSeek-V3): there is no wider file to
start from, and what they stand for is exact in float32.  So whatever reads a float checkpoint by name reads this one,
one expert or some rows at a time, nothing written anywhere, and tuning starts from these values.
Limits: what was lost when they were made is not measured; activations that the owner's kernels round to 8 bits stay
floats, which is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import CheckpointError
from roundexport.importers.interface import QuantizedFolder

from .imported_weights import DEQUANTIZED


@dataclass(frozen=True, eq=False)
class LowBitFloat:
    """One weight of such a file.

    Args:
        name: as a float file would have it.
        shape: likewise.
        tensors: names of the file's tensors that it is made of.
        read: its values from one index along the first axis up to another.
    """

    name: str
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    read: Callable[[int, int], NDArray[np.float32]]


class LowBitFloats:
    """The widened weights of a folder, with the methods of a `TensorFile`.

    Args:
        folder: the folder.
        title: of the format, for people.
        weights: all that are stored so.
        ignored: names of tensors that belong to the owner's kernels and are not read.
        notes: what the format says that is not carried over.
    """

    def __init__(
        self,
        folder: QuantizedFolder,
        title: str,
        weights: list[LowBitFloat],
        ignored: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        self.path = Path(folder.location)
        self._weights = {weight.name: weight for weight in weights}
        self._packed = {tensor for weight in weights for tensor in weight.tensors} | set(ignored)
        if not weights:
            raise CheckpointError(f"{folder.location}: config.json says {title}, but no weight is stored so")
        twice = next((name for name in self._weights if name in folder.tensors and name not in self._packed), None)
        if twice:
            raise CheckpointError(f"{folder.location}: the weights hold {twice} twice, whole and as {title}")
        self.notes = (
            f"{len(weights)} of its tensors are stored as {title} and are read as the floats that they stand for, from "
            "which it is tuned and with which it is compared; what was lost when they were made is not measured",
            *notes,
        )

    def stored(self, files: Mapping[str, str]) -> dict[str, str]:
        """Tensor -> file as a float folder would have it, these weights in a file of their own.

        Args:
            files: of the tensors that are really there.
        """
        left = {name: file for name, file in files.items() if name not in self._packed}
        return {**left, **dict.fromkeys(self._weights, DEQUANTIZED)}

    def dtype(self, name: str) -> str:
        """What :meth:`read_float32` computes in."""
        return "F32"

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight, as the model's parameter has it."""
        return self._weights[name].shape

    def read_float32(
        self, name: str, rows: tuple[int, int] | None = None, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """A weight, or what lies between two indices along its first axis; see `TensorFile.read_float32`."""
        weight = self._weights[name]
        first, last = rows or (0, weight.shape[0])
        if not 0 <= first <= last <= weight.shape[0]:
            raise CheckpointError(f"{self.path}: {name} {list(weight.shape)} has no rows {first} to {last}")
        values = weight.read(first, last)
        if out is None:
            return values
        out[...] = values
        return out
