"""The tensors of a checkpoint's weight files, looked up by name and held against the dtype and shape they must have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import CheckpointError
from roundexport.storage.safetensors_reader import TensorFile

_FLOATS = ("F16", "BF16", "F32")


class Tensors:
    """Tensors of several safetensors files.

    Args:
        files: file by name.
        stored: tensor -> name of its file.
    """

    def __init__(self, files: Mapping[str, TensorFile], stored: Mapping[str, str]) -> None:
        self._files, self._stored = files, stored

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._stored)

    def modules_with(self, part: str) -> list[str]:
        """Paths of the modules that own a tensor of this name, as in ``qweight``, sorted."""
        ending = f".{part}"
        return sorted(name.removesuffix(ending) for name in self._stored if name.endswith(ending))

    def dtype(self, name: str) -> str:
        """Dtype as the file calls it."""
        return self._file(name).dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._file(name).shape(name)

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """Shape of a tensor that must have two dimensions, neither of them empty.

        Raises:
            CheckpointError: it has others.
        """
        shape = self.shape(name)
        if len(shape) != 2 or not all(shape):
            raise CheckpointError(f"{self._file(name).path}: {name} is {list(shape)}; a matrix is expected")
        return shape[0], shape[1]

    def check(self, name: str, dtypes: Sequence[str], shape: tuple[int, ...]) -> None:
        """Hold a tensor against what it must be.

        Raises:
            CheckpointError: it is not there, or of another dtype or shape.
        """
        found = self.dtype(name), self.shape(name)
        if found[0] not in dtypes or found[1] != shape:
            raise CheckpointError(
                f"{self._file(name).path}: {name} is {found[0]} {list(found[1])}; the layer's other tensors and "
                f"quantization_config make it {' or '.join(dtypes)} {list(shape)}"
            )

    def read(self, name: str) -> NDArray[Any]:
        """A tensor as it is in the file, mapped."""
        return self._file(name).read(name)

    def scales(self, name: str, shape: tuple[int, ...]) -> NDArray[np.floating]:
        """Scales: float16 as they are, bfloat16 and float32 as float32; each finite.

        Raises:
            CheckpointError: not there, of another dtype or shape, or not all finite.
        """
        self.check(name, _FLOATS, shape)
        file = self._file(name)
        values: NDArray[np.floating] = (
            np.array(file.read(name)) if file.dtype(name) == "F16" else file.read_float32(name)
        )
        if not np.isfinite(values).all():
            raise CheckpointError(f"{file.path}: {name} holds values that are not finite (NaN or inf)")
        return values

    def _file(self, name: str) -> TensorFile:
        if name not in self._stored:
            raise CheckpointError(f"{self._first()}: there is no tensor {name}; the checkpoint is incomplete")
        return self._files[self._stored[name]]

    def _first(self) -> str:
        return str(next(iter(self._files.values())).path.parent) if self._files else "the checkpoint"
