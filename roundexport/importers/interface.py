"""The seam between a quantized checkpoint and the rest: an `Importer` names the layers that it can read as integers.

    config.json: quantization_config ─ recognizes ─▶ layers(checkpoint) ─▶ ForeignLinear … read() ─▶ QuantizedLinear

A format is one file here that defines ``IMPORTER``.  Its contract:

    recognizes   looks at quantization_config alone, and at most one importer says yes
    layers       every quantized weight, found in the tensors' names, its shapes held against the config; what cannot be
                 said as (code - zero_point) · scale is refused here or in read, by layer and with what to do
    read         integers as they are in the file, nothing rounded; float16 scales stay float16, bfloat16 become float32
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from roundexport.errors import UnsupportedError
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import GROUP_SIZES

from ._tensors import Tensors


@dataclass(frozen=True, eq=False)
class QuantizedFolder:
    """What an importer is given.

    Args:
        location: the folder, for errors.
        config: its quantization_config.
        tensors: all tensors of its weight files.
    """

    location: str
    config: Mapping[str, Any]
    tensors: Tensors


@dataclass(frozen=True, eq=False)
class ForeignLinear:
    """One quantized weight [N, K] of a checkpoint.

    Args:
        name: module path as the file spells it.
        out_features: N.
        in_features: K.
        tensors: names of the file's tensors that it is made of; biases are not among them.
        read: reads and checks it; raises CheckpointError where the numbers make no sense.
    """

    name: str
    out_features: int
    in_features: int
    tensors: tuple[str, ...]
    read: Callable[[], QuantizedLinear]


@dataclass(frozen=True)
class Importer:
    """How one format is read.

    Args:
        title: the format's name, for people.
        recognizes: whether a quantization_config is of this format.
        layers: the quantized weights of a folder; UnsupportedError or CheckpointError where it cannot be read.
        notes: sentences on what the format says that is not carried over, as quantized activations.
    """

    title: str
    recognizes: Callable[[Mapping[str, Any]], bool]
    layers: Callable[[QuantizedFolder], Sequence[ForeignLinear]]
    notes: Callable[[QuantizedFolder], Sequence[str]] = lambda _: ()


def group_size_for(asked: int, width: int, where: str) -> tuple[int | None, int]:
    """The group size under which groups of another size are stored: the same, or a smaller one with repeated scales.

    Args:
        asked: weights per group in the checkpoint; -1, 0 or K: the whole row.
        width: K.
        where: layer, for the error.

    Returns:
        The group size (None: whole row), and how often each scale is repeated.

    Raises:
        UnsupportedError: no group size holds it exactly.
    """
    if asked in (-1, 0, width):
        return None, 1
    if asked < 0 or width % asked:
        raise UnsupportedError(
            f"{where}: its group size {asked} does not divide its {width} inputs; a short last group cannot be held "
            "exactly. Quantize it with a group size that divides, or start from the float model: roundexport tune"
        )
    fits = [size for size in GROUP_SIZES if asked % size == 0]
    if not fits:
        raise UnsupportedError(
            f"{where}: groups of {asked} are not supported; multiples of {GROUP_SIZES[0]}, or the whole row, are. "
            "Start from the float model: roundexport tune"
        )
    return fits[-1], asked // fits[-1]
