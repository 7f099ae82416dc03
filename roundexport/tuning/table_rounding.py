"""Rounding outside the blocks: embeddings and heads, some rows at a time, and norms and biases, to eight bits.

    tables     token embedding, lm_head, other matrices outside the blocks.  A table may be as large as several blocks
               and is never whole in memory.  Rows are independent, so parts give the same integers as the whole.
    vectors    norms and biases, where everything is to be quantized (int8_tensor.py); those of a block are rounded in
               its turn (block_task.py)

The model keeps its float values; the caller substitutes the rounded ones while it needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from roundexport.kernels import round_to_nearest
from roundexport.model.blocks import weight_of
from roundexport.model.streamed_model import StreamedModel
from roundexport.quant.int8_tensor import Int8Tensor
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import LinearInfo, QuantSpec

if TYPE_CHECKING:
    from roundexport.formats.artifact_writer import ArtifactWriter
    from roundexport.schemes.layer_plan import Plan

Quantize = Callable[[Tensor, QuantSpec], QuantizedLinear]
NO_ROWS = torch.empty(0, dtype=torch.long)


@dataclass(frozen=True, eq=False)
class RoundedTable:
    """A table as integers, and some of its rows.

    Args:
        linear: the whole table.
        floats: the requested rows before rounding, float32 [U, K].
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
        ids: rows whose values are returned too, ascending.

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
            rounded[place] = torch.from_numpy(parts[-1].rows(inside.numpy()).dequantize())
        begin, done = begin + len(part), done + len(inside)
    return RoundedTable(QuantizedLinear.concatenate_rows(parts), floats, rounded)


@dataclass(frozen=True, eq=False)
class TableRounder:
    """Rounds what lies outside the blocks, into the artifact; the model keeps its float values.

    Args:
        model: the float model.
        plan: what is rounded, and how.
        writer: of the artifact.
        quantize: rounds a table row by row.
        own: what rounds single tables in its place, by name.
    """

    model: StreamedModel
    plan: Plan
    writer: ArtifactWriter
    quantize: Quantize = round_to_nearest.run
    own: Mapping[str, Quantize] = field(default_factory=dict)

    def embedding(self, ids: Tensor = NO_ROWS) -> tuple[Tensor, Tensor]:
        """Round the token embedding; returns its rows for ``ids``, float and as rounded."""
        name = self.model.embedding_name
        for info, spec in self.plan.layers:
            if f"{info.name}.weight" == name:
                table = round_table(self.model, info, spec, self._of(info), ids)
                self.writer.add(info.name, table.linear)
                return table.floats, table.rounded
        rows = self.model.token_rows(ids)
        return rows, rows

    def others(self) -> dict[str, Tensor]:
        """Round the other tables, and norms and biases outside the blocks, where they are to be rounded.

        Returns:
            Rounded values of the parameters that are in memory, by parameter name.
        """
        rounded: dict[str, Tensor] = {}
        specs = {info.name: spec for info, spec in self.plan.layers}
        for info in self.plan.tables:
            name = f"{info.name}.weight"
            if name == self.model.embedding_name:
                continue
            module = self.model.model.get_submodule(info.name)
            if module.get_parameter("weight").is_meta:
                table = round_table(self.model, info, specs[info.name], self._of(info))
                self.writer.add(info.name, table.linear)
                continue
            linear = self._of(info)(weight_of(module), specs[info.name])
            rounded[name] = _values(module, linear)
            self.writer.add(info.name, linear)
        for name in self.plan.vectors:
            if not self.plan.stack.holds(name):
                vector = self._vector(name, {})
                self.writer.add_override(name, vector)
                if not self.model.model.get_parameter(name).is_meta:
                    rounded[name] = torch.from_numpy(vector.values())
        return rounded

    def values(self) -> dict[str, Tensor]:
        """Rounded values of what lies outside the blocks and is in memory, without writing them again."""
        specs = {info.name: spec for info, spec in self.plan.layers}
        rounded: dict[str, Tensor] = {}
        for info in self.plan.tables:
            module = self.model.model.get_submodule(info.name)
            rounded[f"{info.name}.weight"] = _values(module, self._of(info)(weight_of(module), specs[info.name]))
        for name in self.plan.vectors:
            if not self.plan.stack.holds(name):
                rounded[name] = torch.from_numpy(self._vector(name, {}).values())
        return rounded

    def again(self, index: int, changed: Mapping[str, Tensor]) -> None:
        """Round norms and biases of a block that an earlier run tuned; with -1 those outside the blocks.

        Args:
            index: the block's.
            changed: parameters that a transform changed in it.
        """
        stack = self.plan.stack
        for name in self.plan.vectors:
            if not stack.holds(name) if index < 0 else name.startswith(f"{stack.block_name(index)}."):
                self.writer.add_override(name, self._vector(name, changed))

    def _of(self, info: LinearInfo) -> Quantize:
        return self.own.get(info.name, self.quantize)

    def _vector(self, name: str, changed: Mapping[str, Tensor]) -> Int8Tensor:
        values = changed[name] if name in changed else self.model.read(name)
        return Int8Tensor.nearest(values.numpy())


def _values(module: nn.Module, linear: QuantizedLinear) -> Tensor:
    """What a module's parameter becomes."""
    values = torch.from_numpy(linear.dequantize())
    return values.t() if isinstance(module, Conv1D) else values
