"""A quantized folder as if it were a float one: `<layer>.weight` in place of packed tensors, dequantized when read.

    file        q_proj.qweight, q_proj.qzeros, q_proj.scales, q_proj.bias        (or what another format has)
    here        q_proj.weight  float32 = (code - zero_point) · scale, q_proj.bias as it is

So whatever reads a float checkpoint by name reads this one, a layer at a time, nothing written anywhere.  The last
layer is kept, as rows of a matrix are asked for one part after the other.  Modules that store their weight as [K, N]
(GPT-2's Conv1D) get it so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from roundexport.importers._opening import Opened, open_quantized
from roundexport.importers.interface import QuantizedFolder
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.storage.safetensors_reader import DTYPES

DEQUANTIZED = "(dequantized)"
_CONV1D_TYPES = frozenset("gpt2 gpt-sw3 openai-gpt imagegpt decision_transformer clvp".split())
_CONV1D = re.compile(r"\.(c_attn|q_attn|c_proj|c_fc)\.weight$")


class ImportedWeights:
    """The dequantized weights of a folder, with the methods of a `TensorFile`.

    Args:
        folder: the folder, with its quantization_config.
        model_type: of its config.

    Attributes:
        opened: the layers and their format.

    Raises:
        UnsupportedError, CheckpointError: as of :func:`open_quantized`.
    """

    def __init__(self, folder: QuantizedFolder, model_type: str) -> None:
        self.path = Path(folder.location)
        self.opened: Opened = open_quantized(folder)
        self._tensors = folder.tensors
        self._transposed = {name for name in self.opened.layers if model_type in _CONV1D_TYPES and _CONV1D.search(name)}
        self._last: tuple[str, QuantizedLinear] | None = None

    @property
    def packed_bytes(self) -> int:
        """Of what the layers are made of, as the files have it: codes, scales and zero points."""
        names = {name for layer in self.opened.layers.values() for name in layer.tensors}
        return sum(DTYPES[self._tensors.dtype(name)].itemsize * math.prod(self._tensors.shape(name)) for name in names)

    @property
    def names(self) -> list[str]:
        """Names of the weights, sorted."""
        return sorted(self.opened.layers)

    def stored(self, files: Mapping[str, str]) -> dict[str, str]:
        """Tensor -> file as a float folder would have it, these weights in a file of their own.

        Args:
            files: of the tensors that are really there.
        """
        packed = {tensor for layer in self.opened.layers.values() for tensor in layer.tensors}
        left = {name: file for name, file in files.items() if name not in packed}
        return {**left, **dict.fromkeys(self.opened.layers, DEQUANTIZED)}

    def linear(self, name: str) -> QuantizedLinear:
        """The integers of a weight, as the file has them.

        Raises:
            CheckpointError: numbers that make no sense.
        """
        if self._last is None or self._last[0] != name:
            self._last = name, self.opened.layers[name].read()
        return self._last[1]

    def dtype(self, name: str) -> str:
        """What :meth:`read_float32` computes in."""
        return "F32"

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight, as the model's parameter has it."""
        layer = self.opened.layers[name]
        shape = layer.out_features, layer.in_features
        return shape[::-1] if name in self._transposed else shape

    def read_float32(
        self, name: str, rows: tuple[int, int] | None = None, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """A weight, or some of its rows, dequantized; see `TensorFile.read_float32`."""
        linear = self.linear(name)
        if name in self._transposed:
            values = linear.dequantize().T[slice(*rows) if rows else slice(None)]
        else:
            values = (linear if rows is None else linear.rows(slice(*rows))).dequantize()
        if out is None:
            return np.ascontiguousarray(values)
        out[...] = values
        return out
