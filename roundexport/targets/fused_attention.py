"""How many attention layers of a package run as one operator, counted in the graph that its runtime gets.

    ONNX        nodes of the written file
    OpenVINO    the graph the CPU plugin made of the file, as only that shows what was fused

A layer that is spelled out is found by the softmax over its scores, which has four axes; routers' have fewer.
"""

from __future__ import annotations

from pathlib import Path

from roundexport.formats.package import read_package

from .attention_count import FusedAttention
from .interface import load_target


def fused_attention(folder: Path) -> FusedAttention:
    """Count in a package folder.

    Args:
        folder: a package of any target; OpenVINO's is compiled for the CPU.

    Raises:
        ArtifactError: the package breaks its format.
        UsageError: a target that is not installed.
    """
    manifest = read_package(folder, check_hashes=False)
    return load_target(manifest.target).fused_attention(folder / manifest.model_file)
