"""Tensors in files as Hugging Face folders have them: one, or numbered ones with an index that names each tensor's.

model.safetensors                                    all tensors, where they fit below the limit
model-00001-of-0000n.safetensors, …                  else, in the order in which they were announced
model.safetensors.index.json                         {"metadata": {"total_size"}, "weight_map": {tensor: file}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .safetensors_reader import DTYPES, TensorSpec
from .safetensors_writer import TensorFileWriter

_LIMIT = 4 << 30
_METADATA = {"format": "pt"}  # transformers asks for it


class ShardedWriter:
    """Writes announced tensors, in any order, into the files of a folder.

    Args:
        folder: an existing folder without weight files.
        tensors: name -> (dtype, shape), in the order in which they fill files.
        limit: bytes after which another file is begun.

    Raises:
        WontFitError: the disk cannot hold them, found before anything is written.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorSpec], limit: int = _LIMIT) -> None:
        shards = split({name: _bytes(spec) for name, spec in tensors.items()}, limit) or [[]]
        self._writers: dict[str, TensorFileWriter] = {}
        files: dict[str, str] = {}
        try:
            for number, names in enumerate(shards, 1):
                name = "model" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}"
                path = folder / f"{name}.safetensors"
                writer = TensorFileWriter(path, {tensor: tensors[tensor] for tensor in names}, _METADATA)
                self._writers.update(dict.fromkeys(names, writer))
                files.update(dict.fromkeys(names, path.name))
        except BaseException:
            self.abandon()
            raise
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(map(_bytes, tensors.values()))}, "weight_map": files}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, values: NDArray[Any]) -> None:
        """Write one tensor; see `TensorFileWriter.write`."""
        self._writers[name].write(name, values)

    def close(self) -> None:
        """Finish every file; ArtifactError where a tensor is missing."""
        for writer in set(self._writers.values()):
            writer.close()

    def abandon(self) -> None:
        """Close the files as they are."""
        for writer in set(self._writers.values()):
            writer.abandon()


def _bytes(spec: TensorSpec) -> int:
    return math.prod(spec[1]) * DTYPES[spec[0]].itemsize


def split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names per file, in order: another file where the limit would be passed; what is larger has one for itself.

    Args:
        sizes: bytes by name.
        limit: of a file.
    """
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards
