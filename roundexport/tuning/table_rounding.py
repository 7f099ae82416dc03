"""What is rounded beside the linears of the blocks: tables, in parts, and vectors, to eight bits.

    tables     token embedding, lm_head, other matrices outside the blocks; one is as large as several blocks, and never
               whole in memory.  Rows are rounded independently of each other, so parts give the integers of the whole.
    vectors    norms and biases, where everything is to be quantized (int8_tensor.py): those outside the blocks first,
               those of a block in its turn

What is in memory takes its rounded values there too: blocks are tuned behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roundexport.kernels import round_to_nearest
from roundexport.model.blocks import weight_of
from roundexport.model.streamed_model import StreamedModel
from roundexport.quant.int8_tensor import Int8Tensor
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import LinearInfo, QuantSpec

if TYPE_CHECKING:
    from roundexport.formats.artifact_writer import ArtifactWriter

    from .job import Job

Quantize = Callable[[Tensor, QuantSpec], QuantizedLinear]
NO_ROWS = torch.empty(0, dtype=torch.long)


@dataclass(frozen=True, eq=False)
class RoundedTable:
    """A table as integers, and some of its rows.

    Args:
        linear: the whole table.
        floats: the rows asked for as they were, float32 [U, K].
        rounded: what they became.
    """

    linear: QuantizedLinear
    floats: Tensor
    rounded: Tensor


def round_table(
    weights: StreamedModel, info: LinearInfo, spec: QuantSpec, quantize: Quantize, ids: Tensor = NO_ROWS
) -> RoundedTable:
    """Round a table to integers, some rows at a time.

    Args:
        weights: the model.
        info: the table; its weight is stored [N, K].
        spec: the scheme.
        quantize: rounds a weight [N, K] row by row.
        ids: rows whose values are wanted too, ascending.

    Raises:
        SpecError: the scheme does not fit.
    """
    parts: list[QuantizedLinear] = []
    floats, rounded = (torch.empty(len(ids), info.in_features) for _ in range(2))
    begin = done = 0
    for part in weights.row_chunks(f"{info.name}.weight"):
        parts.append(quantize(part, spec))
        inside = ids[(ids >= begin) & (ids < begin + len(part))] - begin
        if len(inside):
            place = slice(done, done + len(inside))
            floats[place] = part[inside]
            rounded[place] = torch.from_numpy(_select(parts[-1], inside.numpy()).dequantize())
        begin, done = begin + len(part), done + len(inside)
    return RoundedTable(QuantizedLinear.concatenate_rows(parts), floats, rounded)


def round_embedding(job: Job, writer: ArtifactWriter, ids: Tensor = NO_ROWS) -> tuple[Tensor, Tensor]:
    """Round the token embedding, in the artifact; returns its rows for ``ids``, as they were and as they became."""
    for info, spec in job.plan.layers:
        if f"{info.name}.weight" == job.weights.embedding_name:
            found = round_table(job.weights, info, spec, _quantize(job), ids)
            writer.add(info.name, found.linear)
            return found.floats, found.rounded
    rows = job.weights.rows(job.weights.embedding_name, ids)
    return rows, rows


def round_other_tables(job: Job, writer: ArtifactWriter) -> None:
    """Round the tables other than the token embedding, in the artifact and in the model."""
    specs = {info.name: spec for info, spec in job.plan.layers}
    for info in job.plan.tables:
        module = job.model.get_submodule(info.name)
        if f"{info.name}.weight" == job.weights.embedding_name:
            continue
        if module.get_parameter("weight").is_meta:
            writer.add(info.name, round_table(job.weights, info, specs[info.name], _quantize(job)).linear)
            continue
        weight = weight_of(module)
        rounded = _quantize(job)(weight, specs[info.name])
        weight.copy_(torch.from_numpy(rounded.dequantize()))
        writer.add(info.name, rounded)


def round_vectors(job: Job, writer: ArtifactWriter, index: int, changed: Mapping[str, Tensor] | None = None) -> None:
    """Round the norms and biases of a block, or with -1 those outside the blocks, in the artifact and in the model.

    Args:
        job: the run.
        writer: of the artifact.
        index: the block's.
        changed: parameters that are no longer the source's, where the block is not in memory.
    """
    known = changed or {}
    stack = job.plan.stack
    prefix = f"{stack.name}." if index < 0 else f"{stack.block_name(index)}."
    for name in job.plan.vectors:
        if name.startswith(prefix) != (index < 0):
            parameter = job.model.get_parameter(name).detach()
            if parameter.is_meta or name in known:
                values = known[name] if name in known else job.weights.read(name)
            else:
                values = parameter.float().cpu()
            vector = Int8Tensor.nearest(values.numpy())
            if not parameter.is_meta:
                parameter.copy_(torch.from_numpy(vector.values()))
            writer.add_override(name, vector)


def _quantize(job: Job) -> Quantize:
    """How tables are rounded: the method's own way, row by row, or to nearest."""
    found: Quantize = getattr(job.method, "quantize_table", round_to_nearest.run)
    return found


def _select(linear: QuantizedLinear, rows: NDArray[np.int64]) -> QuantizedLinear:
    zero = None if linear.zero_points is None else linear.zero_points[rows]
    return QuantizedLinear(linear.spec, linear.in_features, linear.codes[rows], linear.scales[rows], zero)
