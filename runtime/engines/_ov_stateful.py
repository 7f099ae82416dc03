"""A decoder's rows on OpenVINO where attention cannot be paged: an infer request for each row, its state the cache.

    input_ids [1, S], attention_mask [1, T], position_ids [1, S], beam_idx [1]   →   logits [1, S or 1, V]

- The cache is the request's state; a session's rows share the compiled graph and nothing else, so rows grow one by one.
- Logits of a long prompt cost a product with the whole vocabulary per token, and only the last one's are wanted.  When
  the package is opened, a Slice with an input ``logits_start`` is put before the last MatMul (in memory only); −1
  computes the last position, 0 all of them.
- Cutting back and copying go through the state's tensors [1, Hkv, T, D], which costs a copy of them.
- States of a fixed size (short convolutions, linear attention) cannot be cut back; _states.py says from where a row can
  go on.  With such states prompts are read in pieces, as some of the graph's operators take S × S numbers.

Source: plugin properties at https://docs.openvino.ai; tests/runtime/test_sessions.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from roundexport.runtime.axis_positions import Places, begun, positions, whole_positions
from roundexport.runtime.operator_times import OperatorTimes
from roundexport.runtime.types import DecoderSession, Floats, Ids

from ._ov_graph import Graph, Requests, last_matmul
from ._rows import Closing, check_new, unknown_row
from ._states import EVERY, Marks

if TYPE_CHECKING:
    import openvino as ov


def add_logits_start(model: ov.Model) -> bool:
    """Give a decoder an input ``logits_start`` (int64 [1]): the first position whose logits are computed; in place.

    Returns:
        False, and the model unchanged, if no MatMul is found behind the logits.
    """
    import openvino.opset15 as op

    last = last_matmul(model)
    if last is None:
        return False
    start = op.parameter([1], np.int64, name="logits_start")
    start.output(0).get_tensor().set_names({"logits_start"})
    end, one = op.constant(np.array([2**31 - 1])), op.constant(np.array([1]))
    wanted = op.slice(last.input_value(0), start, end, one, one)
    last.input(0).replace_source_output(wanted.output(0))
    model.add_parameters([start])
    model.validate_nodes_and_infer_types()
    return True


class StatefulDecoder:
    """A decoder whose cache is the state of an infer request.

    Args:
        graph: the compiled graph.
        max_context: most tokens of a row.
        has_logits_start: whether `add_logits_start` changed it.
        fixed: names of states that do not grow with the text.
    """

    def __init__(
        self, graph: Graph, max_context: int, has_logits_start: bool, fixed: frozenset[str] = frozenset()
    ) -> None:
        self.graph, self.token_rows, self.fixed = graph, graph.rows, fixed
        self.max_context = max_context
        self._has_logits_start = has_logits_start
        self._requests = Requests(graph.compiled)

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, times of opening."""
        return {**self.graph.info(), "attention": "stateful"}

    def runs(self) -> int:
        """Runs since it was opened with a profile."""
        return self.graph.runs()

    def operator_times(self) -> list[OperatorTimes]:
        """What operators took in every run; see operator_times.py."""
        return self.graph.operator_times()

    def start(self, *, rows: int = 1, expected: int = 0) -> DecoderSession:
        """A session without rows."""
        return StatefulSession(self)

    def logits(self, ids: Ids) -> Floats:
        """Logits [B, S, V] of whole sequences [B, S]: one run on an empty state."""
        length = ids.shape[1]
        request = self.acquire()
        try:
            places = whole_positions(self.graph.rows if self.graph.axes else None, ids)
            ids = ids.astype(np.int64, copy=False)
            return self.infer(request, ids, places, length, start=0).copy()
        finally:
            self.release(request)

    def acquire(self) -> ov.InferRequest:
        """A request with empty state."""
        return self._requests.acquire()

    def release(self, request: ov.InferRequest) -> None:
        """Forget a request's state and keep it for the next row."""
        request.reset_state()
        self._requests.release(request)

    def infer(self, request: ov.InferRequest, ids: Ids, positions: Ids, total: int, start: int) -> Floats:
        """Logits [B, S or 1, V], in memory that the request writes again at its next run."""
        feeds = {
            **self.graph.tokens(ids),
            "attention_mask": np.ones((len(ids), total), np.int64),
            "position_ids": positions,
            "beam_idx": np.arange(len(ids), dtype=np.int32),
        }
        if self._has_logits_start:
            feeds["logits_start"] = np.array([start], np.int64)
        began = time.perf_counter()
        request.infer({name: feeds[name] for name in feeds if name in self.graph.inputs}, share_inputs=True)
        self.graph.record(request, began)
        return request.get_tensor("logits").data  # type: ignore[no-any-return]


class StatefulSession(Closing):
    """Rows with a request each.

    Args:
        decoder: the graph.
    """

    def __init__(self, decoder: StatefulDecoder) -> None:
        self._decoder = decoder
        self._requests: dict[int, ov.InferRequest] = {}
        self._lengths: dict[int, int] = {}
        self._places: dict[int, Places] = {}
        self._next = 0
        self._marks = Marks()
        self.cuts = not decoder.fixed

    def add(self, count: int = 1) -> list[int]:
        """So many new rows without tokens."""
        return [self._new_row() for _ in range(count)]

    def length(self, row: int) -> int:
        """Tokens of a row."""
        if row not in self._lengths:
            raise unknown_row(row)
        return self._lengths[row]

    def reach(self, row: int, length: int) -> int:
        """The longest beginning of a row, of at most ``length`` tokens, that `fork` and `cut` can give."""
        return length if self.cuts else self._marks.reach(row, self.length(row), length)

    def fork(self, row: int, length: int) -> int:
        """A new row with the first ``length`` tokens of another, by copying its state.

        Raises:
            UnsupportedError: the row cannot go on from there, see `reach`.
        """
        states = self._states_at(row, length)
        made = self._new_row()
        if length:
            self._copy_state(row, made, length, states)
        self._marks.fork(row, made, length)
        self._lengths[made], self._places[made] = length, begun(self._places[row], length)
        return made

    def cut(self, row: int, length: int) -> None:
        """Forget a row's tokens beyond the first ``length``.

        Raises:
            UnsupportedError: the row cannot go on from there, see `reach`.
        """
        states = self._states_at(row, length)
        if length == 0:
            self._requests[row].reset_state()
        elif length < self._lengths[row]:
            self._copy_state(row, row, length, states)
        self._marks.cut(row, length)
        self._lengths[row], self._places[row] = length, begun(self._places[row], length)

    def drop(self, row: int) -> None:
        """Forget a row; its request goes back to the decoder."""
        self.length(row)
        self._decoder.release(self._requests.pop(row))
        self._marks.drop(row)
        del self._lengths[row], self._places[row]

    def extend(self, new: Mapping[int, Sequence[int]]) -> Floats:
        """Append tokens to rows, one row after the other, and give the logits [n, V] after the last one of each.

        Raises:
            UsageError: a row gets no token, or would exceed ``max_context``.
        """
        self._check(new)
        return np.concatenate([self._append(row, tokens, -1)[-1][:, -1] for row, tokens in new.items()])

    def scores(self, row: int, tokens: Sequence[int]) -> Floats:
        """Append tokens to one row and give the logits [S, V] after every one of them.

        Raises:
            UsageError: no token, or the row would exceed ``max_context``.
        """
        self._check({row: tokens})
        return np.concatenate([logits[0] for logits in self._append(row, tokens, 0)])

    def close(self) -> None:
        """Forget every row."""
        for row in list(self._requests):
            self.drop(row)

    def _check(self, new: Mapping[int, Sequence[int]]) -> None:
        check_new(new, self.length, self._decoder.max_context)

    def _append(self, row: int, tokens: Sequence[int], start: int) -> list[Floats]:
        """Logits of every piece; the last one's is in memory that the row's next run writes again."""
        found: list[Floats] = []
        done = 0
        while done < len(tokens):
            past = self._lengths[row]
            piece = tokens[done:] if self.cuts else tokens[done : done + EVERY - past % EVERY]
            done += len(piece)
            self._lengths[row] = total = past + len(piece)
            ids = np.array([piece], np.int64)
            logits = self._decoder.infer(self._requests[row], ids, self._positions(row, past, piece), total, start)
            found.append(logits if done == len(tokens) else logits.copy())
            if not self.cuts and total % EVERY == 0:
                self._marks.note(row, total, self._fixed(row))
        return found

    def _positions(self, row: int, past: int, tokens: Sequence[int]) -> Ids:
        """Positions of tokens behind ``past`` others, [1, S] or [3, 1, S]."""
        graph = self._decoder.graph
        if graph.axes and graph.rows is not None:
            return positions(graph.rows, self._places[row], past, tokens)[:, None]
        return np.arange(past, past + len(tokens), dtype=np.int64)[None]

    def _new_row(self) -> int:
        number, self._next = self._next, self._next + 1
        self._requests[number] = self._decoder.acquire()
        self._lengths[number], self._places[number] = 0, []
        return number

    def _fixed(self, row: int) -> dict[str, Floats]:
        """Copies of a row's states of a fixed size."""
        states = self._requests[row].query_state()
        return {state.name: state.state.data.copy() for state in states if state.name in self._decoder.fixed}

    def _states_at(self, row: int, length: int) -> Mapping[str, Floats]:
        """What a row's states of a fixed size were when it had ``length`` tokens.

        Raises:
            UnsupportedError: nobody knows.
        """
        assert 0 <= length <= self.length(row), "a row is cut and copied within its length"
        if self.cuts or length == 0:
            return {}
        return self._fixed(row) if length == self._lengths[row] else self._marks.at(row, length) or {}

    def _copy_state(self, source: int, target: int, length: int, fixed: Mapping[str, Floats]) -> None:
        import openvino as ov

        states = {state.name: state for state in self._requests[target].query_state()}
        for state in self._requests[source].query_state():
            values = fixed[state.name] if state.name in fixed else state.state.data[:, :, :length]
            states[state.name].state = ov.Tensor(np.ascontiguousarray(values))
