"""A decoder's rows on OpenVINO's CPU: attention over blocks of a shared pool, so that any rows grow in one run.

OpenVINO rewrites a stateful graph for this (``SDPAToPagedAttention``): the state variables go, and each attention reads
and writes its layer's pool

    key_cache.i, value_cache.i   [blocks, Hkv, 32, D]    32 tokens of one row per block; the type is the plugin's choice

Here layers share pools (_ov_pools.py), so that a row's block b is blocks b·n to b·n + n - 1 of the pool of n layers.

Tokens of all rows stand one behind the other, T in all, with no padding:

    input_ids, position_ids      [T]        past_lens            [n]     tokens of each row before this run
    subsequence_begins           [n + 1]    block_indices_begins [n + 1] into block_indices, the rows' blocks in order
    max_context_len              []         logits               [n or T, 1, V]

An input ``logits_at`` (int64) is put in here before the last MatMul: which of the T positions are wanted.

A row is a list of blocks and a length.  Cutting it back gives blocks back; a fork shares them, and whoever writes into
a shared block first gets a copy of it.  Nothing is computed twice, and nothing else is copied.

Limits: the rewriting drops the mask and keeps a window only where it recognizes how the mask was made, which
targets/openvino/mask.py sees to.  Layers whose attention is spelled out (soft caps, position biases) keep their state
variables; such graphs, and devices other than the CPU, are run by _ov_stateful.py.

Source: openvino, src/core/src/op/paged_attention.cpp and sdpa_to_paged_attention.cpp (2026.4); tests/runtime/
test_sessions.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from roundexport.runtime.axis_positions import Places, begun, positions
from roundexport.runtime.operator_times import OperatorTimes
from roundexport.runtime.types import DecoderSession, Floats, Ids

from ._ov_graph import Graph, Requests, last_matmul
from ._ov_pools import share_pools
from ._rows import Closing, check_new, unknown_row

if TYPE_CHECKING:
    import openvino as ov

BLOCK = 32  # tokens of a block on CPU; the compiled graph's inputs say so
_LEAST = 64  # blocks that a pool grows by: memory that nobody has written to costs nothing, copying does


@dataclass(frozen=True, eq=False)
class PagedModel:
    """A model rewritten for paged attention.

    Args:
        model: the model.
        layers: how many layers share a pool, by name of its input.
    """

    model: ov.Model
    layers: Mapping[str, int]


def paged(model: ov.Model) -> PagedModel | None:
    """The model rewritten for paged attention; None where it cannot be wholly, and the model itself is unchanged."""
    import openvino.opset15 as op
    from openvino._offline_transformations import paged_attention_transformation

    found = model.clone()
    try:
        paged_attention_transformation(found)
    except RuntimeError:  # an attention that it does not recognize
        return None
    last = last_matmul(found)
    if last is None or any(node.get_type_name() == "ReadValue" for node in found.get_ops()):
        return None
    at = op.parameter([-1], np.int64, name="logits_at")
    at.output(0).get_tensor().set_names({"logits_at"})
    wanted = op.gather(last.input_value(0), at, op.constant(np.int64(0)))
    last.input(0).replace_source_output(wanted.output(0))
    found.add_parameters([at])
    return PagedModel(found, share_pools(found))


class PagedDecoder:
    """A decoder whose attention is paged.

    Args:
        graph: the compiled graph of `paged`.
        layers: how many layers share a pool, by name of its input.
        max_context: most tokens of a row.
    """

    def __init__(self, graph: Graph, layers: Mapping[str, int], max_context: int) -> None:
        self.graph, self.token_rows = graph, graph.rows
        self.max_context = max_context
        self.requests = Requests(graph.compiled)
        shapes = {name: node for node in graph.compiled.inputs for name in node.get_names()}
        self.caches = {name: _Cache.of(shapes[name], count) for name, count in layers.items()}

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, times of opening."""
        return {**self.graph.info(), "attention": "paged"}

    def runs(self) -> int:
        """Runs since it was opened with a profile."""
        return self.graph.runs()

    def operator_times(self) -> list[OperatorTimes]:
        """What operators took in every run; see operator_times.py."""
        return self.graph.operator_times()

    def start(self, *, rows: int = 1, expected: int = 0) -> DecoderSession:
        """A session without rows; its pool has room for so many, of ``expected`` tokens each, at once."""
        return PagedSession(self, rows, expected)

    def logits(self, ids: Ids) -> Floats:
        """Logits [B, S, V] of whole sequences [B, S]."""
        with self.start(rows=len(ids), expected=ids.shape[1]) as session:
            return np.stack([session.scores(session.add()[0], row) for row in ids.tolist()])


@dataclass(frozen=True)
class _Cache:
    """A pool's input: its type, the shape of a block, and how many layers share it."""

    kind: Any
    shape: tuple[int, ...]
    layers: int

    @classmethod
    def of(cls, node: Any, layers: int) -> _Cache:
        shape = tuple(part.get_length() for part in list(node.get_partial_shape())[1:])
        return cls(node.get_element_type(), shape, layers)

    def pool(self, blocks: int) -> ov.Tensor:
        """A tensor with room for so many blocks of every layer."""
        import openvino as ov

        return ov.Tensor(self.kind, ov.Shape([blocks * self.layers, *self.shape]))

    def part(self, pool: ov.Tensor, begin: int, end: int) -> ov.Tensor:
        """These blocks of every layer, in the pool's own memory."""
        import openvino as ov

        begin, end = begin * self.layers, end * self.layers
        return ov.Tensor(pool, ov.Coordinate([begin, 0, 0, 0]), ov.Coordinate([end, *self.shape]))


@dataclass
class _Row:
    blocks: list[int] = field(default_factory=list)
    length: int = 0
    places: Places = field(default_factory=list)


class PagedSession(Closing):
    """Rows as lists of blocks.

    Args:
        decoder: the graph.
        rows: rows to have room for from the start.
        expected: tokens of each.
    """

    cuts = True

    def __init__(self, decoder: PagedDecoder, rows: int, expected: int) -> None:
        self._decoder = decoder
        self._request: ov.InferRequest | None = decoder.requests.acquire()
        self._rows: dict[int, _Row] = {}
        self._next = 0
        self._free: list[int] = []
        self._users = np.zeros(0, np.int32)  # rows that hold a block
        self._pool: dict[str, ov.Tensor] = {}
        self._bound: dict[str, np.ndarray[Any, Any]] = {}
        self._grow(max(rows, 1) * _blocks(max(expected, 1)))

    def add(self, count: int = 1) -> list[int]:
        """So many new rows without tokens."""
        return [self._new_row(_Row()) for _ in range(count)]

    def length(self, row: int) -> int:
        """Tokens of a row."""
        return self._row(row).length

    def reach(self, row: int, length: int) -> int:
        """The longest beginning of a row, of at most ``length`` tokens, that `fork` and `cut` can give: any."""
        return length

    def fork(self, row: int, length: int) -> int:
        """A new row with the first ``length`` tokens of another, in the same blocks."""
        source = self._row(row)
        assert 0 <= length <= source.length, "a fork is no longer than its source"
        shared = source.blocks[: _blocks(length)]
        self._users[shared] += 1
        return self._new_row(_Row(list(shared), length, begun(source.places, length)))

    def cut(self, row: int, length: int) -> None:
        """Forget a row's tokens beyond the first ``length``."""
        found = self._row(row)
        assert 0 <= length <= found.length, "a cut makes no row longer"
        keep = _blocks(length)
        self._give_back(found.blocks[keep:])
        del found.blocks[keep:]
        found.length, found.places = length, begun(found.places, length)

    def drop(self, row: int) -> None:
        """Forget a row."""
        self._give_back(self._row(row).blocks)
        del self._rows[row]

    def extend(self, new: Mapping[int, Sequence[int]]) -> Floats:
        """Append tokens to rows and give the logits [n, V] after the last one of each, in the order of ``new``.

        Raises:
            UsageError: a row gets no token, or would exceed ``max_context``.
        """
        self._check(new)
        chunk = self._decoder.graph.prefill_chunk  # bounds the memory of activations
        for row, tokens in new.items():
            for start in range(0, len(tokens) - chunk, chunk):
                self._run({row: tokens[start : start + chunk]}, every=False)
        rest = {row: tokens[(len(tokens) - 1) // chunk * chunk :] for row, tokens in new.items()}
        return self._run(rest, every=False)

    def scores(self, row: int, tokens: Sequence[int]) -> Floats:
        """Append tokens to one row and give the logits [S, V] after every one of them.

        Raises:
            UsageError: no token, or the row would exceed ``max_context``.
        """
        self._check({row: tokens})
        chunk = self._decoder.graph.prefill_chunk
        parts = [tokens[start : start + chunk] for start in range(0, len(tokens), chunk)]
        found = [self._run({row: part}, every=True).copy() for part in parts]
        return np.concatenate(found) if len(found) > 1 else found[0]

    def close(self) -> None:
        """Free the pool; the request goes back to the decoder."""
        if self._request is not None:
            for name, cache in self._decoder.caches.items():
                self._request.set_tensor(name, cache.pool(0))
            self._decoder.requests.release(self._request)
            self._request = None
            self._pool.clear()
            self._bound.clear()
            self._rows.clear()

    def _check(self, new: Mapping[int, Sequence[int]]) -> None:
        check_new(new, self.length, self._decoder.max_context)

    def _run(self, new: Mapping[int, Sequence[int]], every: bool) -> Floats:
        """One run over the new tokens of several rows: logits [n, V], or [T, V] of every token."""
        assert self._request is not None, "the session is closed"
        ids: list[int] = []
        numbers: list[Ids] = []
        past: list[int] = []
        blocks: list[int] = []
        ends, block_ends, longest = [0], [0], 0
        for number, tokens in new.items():
            row = self._row(number)
            self._make_room(row, len(tokens))
            begin, row.length = row.length, row.length + len(tokens)
            ids += tokens
            numbers.append(self._positions(row, begin, tokens))
            past.append(begin)
            ends.append(len(ids))
            blocks += row.blocks
            block_ends.append(len(blocks))
            longest = max(longest, row.length)
        for name, array in self._decoder.graph.tokens(np.array(ids, np.int64)).items():
            self._bind(name, array)
        self._bind("position_ids", np.concatenate(numbers, -1))
        self._bind("past_lens", np.array(past, np.int32))
        self._bind("subsequence_begins", np.array(ends, np.int32))
        self._bind("block_indices", np.array(blocks, np.int32))
        self._bind("block_indices_begins", np.array(block_ends, np.int32))
        self._bind("max_context_len", np.array(longest, np.int32))
        self._bind("logits_at", np.array(range(ends[-1]) if every else [end - 1 for end in ends[1:]], np.int64))
        began = time.perf_counter()
        self._request.start_async()
        self._request.wait()
        self._decoder.graph.record(self._request, began)
        return self._request.get_tensor("logits").data[:, 0]  # type: ignore[no-any-return]

    def _positions(self, row: _Row, past: int, tokens: Sequence[int]) -> Ids:
        """Positions of tokens behind ``past`` others, [S] or [3, S]."""
        graph = self._decoder.graph
        if graph.axes and graph.rows is not None:
            return positions(graph.rows, row.places, past, tokens)
        return np.arange(past, past + len(tokens), dtype=np.int64)

    def _bind(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Hand over an input that the graph has: into the memory that is bound already where the shape is the same."""
        if name not in self._decoder.graph.inputs:
            return
        assert self._request is not None, "the session is closed"
        bound = self._bound.get(name)
        if bound is not None and bound.shape == array.shape:
            bound[...] = array
            return
        import openvino as ov

        self._bound[name] = kept = array.copy()
        self._request.set_tensor(name, ov.Tensor(kept, shared_memory=True))

    def _make_room(self, row: _Row, count: int) -> None:
        """Give a row blocks for ``count`` more tokens, and its last, half-filled one to it alone."""
        wanted = _blocks(row.length + count) - len(row.blocks)
        shared = row.length % BLOCK > 0 and self._users[row.blocks[row.length // BLOCK]] > 1
        if len(self._free) < wanted + shared:
            self._grow(max(wanted + shared, len(self._users) // 2, _LEAST))
        if shared:
            at = row.length // BLOCK
            old, row.blocks[at] = row.blocks[at], self._take()
            self._copy_block(old, row.blocks[at])
            self._give_back([old])
        row.blocks += [self._take() for _ in range(wanted)]

    def _take(self) -> int:
        block = self._free.pop()
        self._users[block] = 1
        return block

    def _give_back(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free.append(block)

    def _copy_block(self, source: int, target: int) -> None:
        for name, cache in self._decoder.caches.items():
            pool = self._pool[name]
            cache.part(pool, source, source + 1).copy_to(cache.part(pool, target, target + 1))

    def _grow(self, more: int) -> None:
        """Add so many blocks to the pool; its tensors are made anew and their content copied."""
        assert self._request is not None, "the session is closed"
        used = len(self._users)
        for name, cache in self._decoder.caches.items():
            grown = cache.pool(used + more)
            if used:
                self._pool[name].copy_to(cache.part(grown, 0, used))
            self._pool[name] = grown
            self._request.set_tensor(name, grown)
        self._users = np.concatenate([self._users, np.zeros(more, np.int32)])
        self._free += range(used + more - 1, used - 1, -1)

    def _new_row(self, row: _Row) -> int:
        number, self._next = self._next, self._next + 1
        self._rows[number] = row
        return number

    def _row(self, row: int) -> _Row:
        try:
            return self._rows[row]
        except KeyError:
            raise unknown_row(row) from None


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)
