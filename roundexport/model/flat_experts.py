"""DBRX's experts on disk: the matrices of all experts one below the other, without an axis for experts.

    <experts>.mlp.w1 [E·I, H]    gate_proj of each expert, [I, H]
    <experts>.mlp.v1 [E·I, H]    up_proj
    <experts>.mlp.w2 [E·I, H]    down_proj, stored [I, H] where the linear is [H, I]

How many there are is said by the router beside them, [E, H].
Source: modeling_dbrx.py of transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import CheckpointError

from .expert_names import DOWN, GATE, UP

_FLAT = re.compile(r"(.*)\.experts\.mlp\.(w1|v1|w2)")
_PARTS = {"w1": GATE, "v1": UP, "w2": DOWN}


@dataclass(frozen=True)
class FlatExpert:
    """Where one expert's matrix lies.

    Args:
        expert: its number.
        of: how many there are.
        transposed: it is stored [K, N].
    """

    expert: int
    of: int
    transposed: bool

    def shape(self, stacked: tuple[int, ...]) -> tuple[int, ...]:
        """Shape [N, K] of the matrix."""
        rows, columns = stacked[0] // self.of, stacked[1]
        return (columns, rows) if self.transposed else (rows, columns)

    def source_rows(self, stacked: tuple[int, ...]) -> tuple[int, int]:
        """The rows that must be read for it."""
        rows = stacked[0] // self.of
        return self.expert * rows, (self.expert + 1) * rows

    def cut(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """The matrix of those rows."""
        return rows.T if self.transposed else rows


def flat_parts(
    names: Mapping[str, str], shape: Callable[[str], tuple[int, ...]]
) -> Iterator[tuple[str, str, FlatExpert]]:
    """What is in such tensors of a checkpoint.

    Args:
        names: name in the model -> name in the file.
        shape: shape of a tensor of the file.

    Yields:
        Name of the stack in the model, name of the part, and where it lies.

    Raises:
        CheckpointError: there is no router, or rows that do not divide.
    """
    for name, stored in names.items():
        found = _FLAT.fullmatch(name)
        if found is None:
            continue
        path, kind = found.groups()
        router = names.get(f"{path}.router.layer.weight")
        count = shape(router)[0] if router is not None else 0
        if not count or shape(stored)[0] % count:
            raise CheckpointError(f"{name} is {list(shape(stored))}, which are not the matrices of {count} experts")
        for expert in range(count):
            own = f"{path}.experts.{expert}.{_PARTS[kind]}.weight"
            yield name, own, FlatExpert(expert, count, kind == "w2")
