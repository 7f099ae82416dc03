"""Which rotary embeddings go into an attention operator, and the tables of cosines and sines that operators read.

GroupQueryAttention turns queries and keys itself, by the place of each token, from one table for both:

    table [max_context, R/2]     R the turned part of a head, its front; pairs in halves, or side by side
    kernel                       R and the width of a head are multiples of 16

Where pairs lie side by side, the table is filled up to such a width with angles of zero, which turn nothing: a head of
32 of which 24 turn goes in as well.  In halves that would pair other numbers, so there another R stays outside.

What stays outside is com.microsoft::RotaryEmbedding in front of the attention, or plain operators where angles depend
on more than positions: see rope.py.  Source: group_query_attention_helper.h of ONNX Runtime, and onnxruntime 1.31.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from roundexport.graph.capture import Capture
from roundexport.graph.placeholders import AttentionInfo

from .graph import PLACEHOLDER, Editor, dims, integer, made_by

_STEP = 16


@dataclass(frozen=True)
class Inside:
    """A rotary embedding that an attention operator does: what it turns, by which tables."""

    q: ir.Value
    k: ir.Value
    cos: ir.Value
    sin: ir.Value
    interleaved: bool


class RotaryTables:
    """Tables as initializers, each made at the first request.

    Args:
        editor: the graph.
        captured: holds the tables.
        max_context: rows of each.
    """

    def __init__(self, editor: Editor, captured: Capture, max_context: int) -> None:
        self._editor, self._captured, self._length = editor, captured, max_context
        self._made: dict[tuple[int, int], tuple[ir.Value, ir.Value]] = {}

    def of(self, rope: ir.Node, columns: int | None = None) -> tuple[ir.Value, ir.Value] | None:
        """Cosines and sines [max_context, R/2] of a rope placeholder, or None where it has none.

        Args:
            rope: the placeholder.
            columns: of the tables, filled up with angles of zero; None: as they are.
        """
        place = self._captured.rope_table_of.get(integer(rope, "index"))
        if place is None:
            return None
        table = self._captured.rope_tables[place]
        wide = columns or int(table.cos.shape[-1])
        if (place, wide) not in self._made:
            made = []
            for part, values, rest in (("cos", table.cos, 1.0), ("sin", table.sin, 0.0)):
                rows = values.numpy()[: self._length]
                rows = np.pad(rows, ((0, 0), (0, wide - rows.shape[1])), constant_values=rest)
                name = f"rotary_{part}.{len(self._made)}"
                made.append(self._editor.initializer(name, ir.tensor(np.ascontiguousarray(rows), name=name)))
            self._made[place, wide] = made[0], made[1]
        return self._made[place, wide]

    def inside(self, attention: ir.Node, info: AttentionInfo) -> Inside | None:
        """The rotary embedding that the attention operator can do itself, or None."""
        ropes = [made_by(value, "rope", PLACEHOLDER) for value in attention.inputs[:2]]
        q, k = ropes
        if q is None and k is None:
            return None
        columns, reason = 0, "queries and keys are not turned alike"
        if q is not None and k is not None and self._key(q) == self._key(k):
            columns, reason = self._columns(q, info)
        if q is None or k is None or not columns:
            self._editor.log.refused.append(
                ("rotary in attention", f"attention layer {info.index}: {reason}; it is an operator of its own")
            )
            return None
        tables = self.of(q, columns)
        assert tables is not None
        return Inside(q.inputs[0], k.inputs[0], *tables, bool(integer(q, "interleaved")))

    def _key(self, rope: ir.Node) -> tuple[object, ...]:
        """Equal for ropes that turn alike."""
        index = integer(rope, "index")
        return self._captured.rope_table_of.get(index, index), integer(rope, "interleaved")

    def _columns(self, rope: ir.Node, info: AttentionInfo) -> tuple[int, str]:
        """Columns of the table that the operator takes for a rope, or 0 and why it takes none."""
        if integer(rope, "index") not in self._captured.rope_table_of:
            return 0, "its angles depend on more than positions"
        if info.head_dim % _STEP or info.value_dim > info.head_dim:
            return 0, f"its heads of {info.head_dim} are not a multiple of {_STEP}"
        turned = 2 * int((dims(rope.inputs[1]) or (0,))[-1])
        wide = -(-turned // _STEP) * _STEP
        if wide != turned and not (integer(rope, "interleaved") and wide <= info.head_dim):
            return 0, f"it turns {turned} of {info.head_dim}, which is not a multiple of {_STEP}"
        return wide // 2, ""
