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

    def tensor(self, name: str, values: NDArray[Any]) -> ir.TensorProtocol:
        """Write an array and return the tensor that refers to it; a small one is returned as it is."""
        values = np.ascontiguousarray(values)
        if values.nbytes < INLINE_BYTES:
            return ir.tensor(values.copy(), name=name)
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
            ir.DataType.from_numpy(values.dtype),
            shape=ir.Shape(values.shape),
            name=name,
            base_dir=self.path.parent,
        )
