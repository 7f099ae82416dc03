"""Mixtures of experts on disk: from whatever tensors a file has to one matrix per expert and projection.

    in the model and in artifacts    <experts>.<number>.gate_proj | up_proj | down_proj  .weight [N, K], .bias [N]
    one tensor per matrix            the same names, or w1, w3, w2 for gate, up, down
    stacked                          gate_up_proj [E, 2I, H] (first gate, then up), down_proj [E, H, I]
                                     transposed in some families, gate and up rows in turn in some (LAYOUTS)

Experts of one layer are one parameter in transformers 5.  Here each is a linear of its own, under the name that the
checkpoints of most families have, so that everything that is said of linears (schemes, rules, integers, proofs) holds
for it.  Names and shapes alone decide; the model's class is held against LAYOUTS when it is built (experts.py).

Stacks of 4-bit floats are widened where they are read (mxfp4.py); of integers no format is known.
Source: conversion_mapping.py and the `use_experts_implementation` of transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import CheckpointError

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


@dataclass(frozen=True)
class Layout:
    """How the experts of a family are stacked.

    Args:
        transposed: matrices are stored [K, N].
        interleaved: rows of gate and up take turns; False: first all of gate, then all of up.
    """

    transposed: bool = False
    interleaved: bool = False


LAYOUTS = {
    "gpt_oss": Layout(transposed=True, interleaved=True),
    "openai_privacy_filter": Layout(transposed=True),
    "aria_text": Layout(transposed=True),
    "llama4_text": Layout(transposed=True),
}
"""By model type; all others are stacked as `Layout` has it."""

_SPELLED = (
    (re.compile(r"\.experts\.(\d+)\.w1\."), rf".experts.\1.{GATE}."),
    (re.compile(r"\.experts\.(\d+)\.w3\."), rf".experts.\1.{UP}."),
    (re.compile(r"\.experts\.(\d+)\.w2\."), rf".experts.\1.{DOWN}."),
    (re.compile(r"\.block_sparse_moe\.(experts\.\d+\.|gate\.)"), r".mlp.\1"),
    (re.compile(r"\.block_sparse_moe\.e_score_correction_bias$"), ".mlp.gate.e_score_correction_bias"),
    (re.compile(r"\.block_sparse_moe\.input_linear\.weight$"), ".block_sparse_moe.experts.gate_up_proj"),
    (re.compile(r"\.block_sparse_moe\.output_linear\.weight$"), ".block_sparse_moe.experts.down_proj"),
    (re.compile(r"\.block_sparse_moe\.router\.layer\.weight$"), ".block_sparse_moe.router.weight"),
)
_OF_TYPE = {
    "phimoe": ((re.compile(r"\.mlp\.gate\.weight$"), ".mlp.router.weight"),),
    "minimax_m2": ((re.compile(r"\.mlp\.gate\.e_score_correction_bias$"), ".mlp.e_score_correction_bias"),),
}
_STACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|up_proj|down_proj)(_bias)?")
_PARTS = {"gate_up_proj": (GATE, UP), "up_proj": (UP,), "down_proj": (DOWN,)}


def modern_name(name: str, model_type: str) -> str:
    """A tensor's name with the module paths of transformers 5, where it belongs to a mixture of experts."""
    for pattern, replacement in (*_SPELLED, *_OF_TYPE.get(model_type, ())):
        name = pattern.sub(replacement, name)
    return name


@dataclass(frozen=True)
class ExpertPart:
    """Where one expert's matrix or bias lies in a stacked tensor.

    Args:
        expert: its number.
        half: 0 gate, 1 up, of a tensor that holds both; None: the tensor holds one matrix per expert.
        layout: of the stack.
        bias: a vector per expert, not a matrix.
    """

    expert: int
    half: int | None
    layout: Layout
    bias: bool

    def shape(self, stacked: tuple[int, ...]) -> tuple[int, ...]:
        """Shape [N, K] or [N] of the part of a stack [E, …]."""
        sizes = stacked[1:] if self.bias or not self.layout.transposed else stacked[:0:-1]
        return sizes if self.half is None else (sizes[0] // 2, *sizes[1:])

    def source_rows(self, stacked: tuple[int, ...]) -> tuple[int, int]:
        """What must be read for it, along the first axis."""
        return self.expert, self.expert + 1

    def cut(self, stacked: NDArray[np.float32]) -> NDArray[np.float32]:
        """The part of one expert's piece [1, …] of the stack."""
        values: NDArray[np.float32] = stacked[0] if self.bias or not self.layout.transposed else stacked[0].T
        if self.half is None:
            return values
        middle = len(values) // 2
        half = slice(self.half, None, 2) if self.layout.interleaved else slice(self.half * middle, None)
        cut: NDArray[np.float32] = values[half][:middle]
        return cut


def stacked_parts(
    names: Mapping[str, str], shape: Callable[[str], tuple[int, ...]], model_type: str
) -> Iterator[tuple[str, str, ExpertPart]]:
    """What is in the stacked tensors of a checkpoint.

    Args:
        names: name in the model -> name in the file.
        shape: shape of a tensor of the file.
        model_type: of the config.

    Yields:
        Name of the stack in the model, name of the part, and where it lies.

    Raises:
        CheckpointError: a stack whose shape is not that of stacked matrices or vectors.
    """
    layout = LAYOUTS.get(model_type, Layout())
    for name, stored in names.items():
        found = _STACKED.fullmatch(name)
        if found is None:
            continue
        path, kind, bias = found.groups()
        sizes, wanted = shape(stored), 2 if bias else 3
        parts = _PARTS[kind]
        rows = sizes[-1] if bias or layout.transposed else sizes[-2] if len(sizes) > 1 else 0
        if len(sizes) != wanted or rows % len(parts):
            raise CheckpointError(f"{name} is {list(sizes)}; {wanted} axes, the first over experts, are expected")
        for expert in range(sizes[0]):
            for half, part in enumerate(parts):
                own = f"{path}.{expert}.{part}.{'bias' if bias else 'weight'}"
                yield name, own, ExpertPart(expert, half if len(parts) > 1 else None, layout, bool(bias))
