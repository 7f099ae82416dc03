"""The external data file: every large tensor appended once, at an aligned offset, and forgotten.

Memory stays at one tensor, whatever the model's size.  Tensors of a megabyte and more start on a page (4096 bytes), so
that a runtime can map them; smaller ones on a cache line.  Tensors below a kilobyte stay inside the model file, where
shape inference can read them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

INLINE_BYTES = 1024
_PAGE, _LINE = 4096, 64


class DataFile:
    """Appends arrays to one file beside the model.

    Args:
        path: the file; begun anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._end = 0
        path.write_bytes(b"")

    def tensor(
        self, name: str, values: NDArray[Any], packed: tuple[ir.DataType, tuple[int, ...]] | None = None
    ) -> ir.TensorProtocol:
        """Write an array and return the tensor that refers to it; a small one is returned as it is.

        Args:
            name: the tensor's.
            values: its numbers, or its bytes.
            packed: type and shape of what the bytes hold, where numpy's own do not say it: of 4 bits, or bfloat16.
        """
        values = np.ascontiguousarray(values)
        dtype, shape = packed or (ir.DataType.from_numpy(values.dtype), values.shape)
        if values.nbytes < INLINE_BYTES:
            if packed is None:
                return ir.tensor(values.copy(), name=name)
            if dtype.bitwidth < 8:
                return ir.PackedTensor(values.copy(), dtype, shape=shape, name=name)
            return ir.tensor(values.copy().view(dtype.numpy()).reshape(shape), name=name)
        align = _PAGE if values.nbytes >= 1 << 20 else _LINE
        offset = -(-self._end // align) * align
        with open(self.path, "r+b") as file:
            file.seek(offset)  # the gap reads as zeros
            values.tofile(file)
        self._end = offset + values.nbytes
        return ir.ExternalTensor(
            self.path.name,
            offset,
            values.nbytes,
            dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=self.path.parent,
        )
