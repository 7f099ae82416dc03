"""Torch tensors in a safetensors file, as processes of a run hand them to each other; read mapped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from roundexport.storage.safetensors_reader import TensorFile
from roundexport.storage.safetensors_writer import write_tensors

_DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bfloat16: "BF16"}


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of the types that runs share."""
    arrays = {key: (_DTYPES[tensor.dtype], _array(tensor)) for key, tensor in tensors.items()}
    write_tensors(path, arrays, {"format": "roundexport-parts/1"})


def read_file(path: Path) -> dict[str, Tensor]:
    """Tensors by name, mapped; writing to them stays in this process."""
    file = TensorFile(path)
    return {name: _tensor(file.read(name, private=True), file.dtype(name)) for name in file.names}


def _array(tensor: Tensor) -> np.ndarray:
    whole = tensor.detach().cpu().contiguous()
    return whole.view(torch.int16).numpy().view(np.uint16) if whole.dtype == torch.bfloat16 else whole.numpy()


def _tensor(array: np.ndarray, dtype: str) -> Tensor:
    found = torch.from_numpy(array)
    return found.view(torch.bfloat16) if dtype == "BF16" else found
