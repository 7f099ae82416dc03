"""The sha256 of each layer in an artifact that is still being written: its tensors' names and bytes, by name.

A run that goes on from an unfinished artifact holds its finished layers against what it recorded of them, since the
manifest, which lists the hash of whole files, is written last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

import numpy as np

from roundexport.storage.safetensors_reader import TensorFile


def layer_digests(folder: Path, layers: Collection[str]) -> dict[str, str]:
    """Hash finished layers.

    Args:
        folder: an artifact's folder, finished or not.
        layers: names; those that are not there are left out.

    Returns:
        Layer -> hex sha256.

    Raises:
        ArtifactError: a tensor file contradicts its format.
    """
    wanted, tensors = set(layers), dict[str, list[tuple[str, TensorFile]]]()
    for path in sorted(folder.glob("quantized-*.safetensors")):
        file = TensorFile(path)
        for name in file.names:
            layer = name.rpartition(".")[0]
            if layer in wanted:
                tensors.setdefault(layer, []).append((name, file))
    digests = {}
    for layer, parts in tensors.items():
        digest = hashlib.sha256()
        for name, file in parts:
            digest.update(f"{name}\0".encode())
            digest.update(np.ascontiguousarray(file.read(name)).reshape(-1).view(np.uint8).data)
        digests[layer] = digest.hexdigest()
    return digests
