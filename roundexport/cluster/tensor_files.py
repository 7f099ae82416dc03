"""Torch tensors in a safetensors file, as processes of a run hand them to each other; read mapped.

A matrix that lies column by column, as a Cholesky factor does, is stored as its transpose and comes back as it lay:
LAPACK rounds otherwise where it lies row by row, and the bytes of a run must not depend on who did which part.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from roundexport.storage.safetensors_reader import TensorFile
from roundexport.storage.safetensors_writer import write_tensors

_DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bfloat16: "BF16"}
_TRANSPOSED = "transposed "  # before the name of such a matrix


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of the types that runs share."""
    arrays = {key: (_DTYPES[tensor.dtype], _array(tensor)) for key, tensor in _by_rows(tensors).items()}
    write_tensors(path, arrays, {"format": "roundexport-parts/1"})


def read_file(path: Path) -> dict[str, Tensor]:
    """Tensors by name, mapped; writing to them stays in this process."""
    file = TensorFile(path)
    found = {name: _tensor(file.read(name, private=True), file.dtype(name)) for name in file.names}
    return {
        name.removeprefix(_TRANSPOSED): tensor.t() if name.startswith(_TRANSPOSED) else tensor
        for name, tensor in found.items()
    }


def _by_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they lie; those that lie column by column as their transpose, under a name that says so."""
    found = {}
    for name, tensor in tensors.items():
        by_columns = tensor.ndim == 2 and not tensor.is_contiguous() and tensor.t().is_contiguous()
        found[f"{_TRANSPOSED}{name}" if by_columns else name] = tensor.t() if by_columns else tensor
    return found


def _array(tensor: Tensor) -> np.ndarray:
    whole = tensor.detach().cpu().contiguous()
    return whole.view(torch.int16).numpy().view(np.uint16) if whole.dtype == torch.bfloat16 else whole.numpy()


def _tensor(array: np.ndarray, dtype: str) -> Tensor:
    found = torch.from_numpy(array)
    return found.view(torch.bfloat16) if dtype == "BF16" else found
