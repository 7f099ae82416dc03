"""Tensors of a file that hold several of the model's: which, and where each lies.

stacks of experts      an axis over experts (expert_names.py), or one below the other (flat_experts.py)
packed projections     rows of q, k and v in one matrix (packed_names.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from .expert_names import ExpertPart, stacked_parts
from .flat_experts import FlatExpert, flat_parts
from .packed_names import RowPart, packed_parts

TensorPart = ExpertPart | FlatExpert | RowPart


def parts_of(
    names: Mapping[str, str], shape: Callable[[str], tuple[int, ...]], model_type: str
) -> Iterator[tuple[str, str, TensorPart]]:
    """What is in such tensors of a checkpoint.

    Args:
        names: name in the model -> name in the file.
        shape: shape of a tensor of the file.
        model_type: of the config.

    Yields:
        Name of the tensor in the model, name of the part, and where it lies.

    Raises:
        CheckpointError: a tensor whose shape is not that of such a one.
    """
    yield from stacked_parts(names, shape, model_type)
    yield from flat_parts(names, shape)
    yield from packed_parts(names, shape, model_type)
