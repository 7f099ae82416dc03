"""Decomposition of a captured program operator by operator, where torch would trace the whole program again, twice.

A target's front end cannot translate every operator that `torch.export` leaves in a program; it names those that it
wants spelled out in others (``table``) and calls ``program.run_decompositions(table)``.  torch then runs all of the
program under functionalization, once for its metadata and once for its graph, which takes longer than the capture and
than the translation.  In a captured program most operators are placeholders or what the front end takes as it is, and
none writes to its inputs, so here

    every node whose operator is not in the table    is copied, but for composite views (reshape, to)
    the others, all in one trace                      are run by the table's functions on their own fake inputs, and
                                                     what that recorded takes their place
    a size that is known under another node already   is taken from there

Exporting two blocks of a Llama (tests/conftest.py) took 2.5 CPU seconds to ONNX, 2.6 to OpenVINO; now .9 and 1.7.

An operator that writes into what another one has just made, which nothing else can see, is the one that does not write.

The result has the same inputs, outputs, parameters and constraints.  Whatever is unusual (other operators that write, a
subgraph, a constant that a decomposition makes, an error of any kind) sends the program to torch's own way, so the
worst that can happen is the time of before.

Source: torch/export/exported_program.py, `_decompose_exported_program`; for tables, `CustomDecompTable`.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind, TensorArgument
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from roundexport.errors import UnsupportedError

Table = Mapping[Any, Callable[..., Any]]


_OF_MEMORY = (torch.ops.aten.sym_stride.int, torch.ops.aten.sym_storage_offset.default)


class _Unusual(Exception):  # noqa: N818
    """Something that only torch's own way can do."""


class QuickProgram(ExportedProgram):
    """An exported program that is decomposed operator by operator where that can be done."""

    @classmethod
    def of(cls, program: ExportedProgram) -> QuickProgram:
        """The same program, of this class."""
        program.__class__ = cls
        return program  # type: ignore[return-value]

    def run_decompositions(
        self, decomp_table: dict[Any, Callable[..., Any]] | None = None, decompose_custom_triton_ops: bool = False
    ) -> ExportedProgram:
        """A program in which no operator of the table is left.

        Args:
            decomp_table: operator -> function that does the same by others; None: torch's default.
            decompose_custom_triton_ops: as torch's.
        """
        table = torch.export.default_decompositions() if decomp_table is None else decomp_table
        try:
            return decomposed(self, table)
        except UnsupportedError:
            raise
        except Exception:  # whatever it was: torch's own way either can do it or names the reason
            whole: ExportedProgram = super().run_decompositions(decomp_table, decompose_custom_triton_ops)
            return whole


def decomposed(program: ExportedProgram, table: Table) -> ExportedProgram:
    """The program with the operators of the table replaced.

    Args:
        program: of torch.export; is not changed.
        table: operator -> function that does the same by others.

    Raises:
        UnsupportedError: a free size is not free any more.
        Exception: of any other kind, where something in the program is unusual.
    """
    if any(spec.kind is not OutputKind.USER_OUTPUT for spec in program.graph_signature.output_specs):
        raise _Unusual("the program writes to its parameters or inputs")
    nodes = list(program.graph.nodes)
    for node in nodes:
        _check(node, twin=lambda node: _twin(node, table))
    chosen = [
        node
        for node in nodes
        if not (_size(node) or _writes(node)) and (node.target in table or _is_composite_view(node.target))
    ]
    graph = _Splice(_trace(chosen, table), table).of(nodes)
    graph.eliminate_dead_code()
    graph.lint()
    return _with_graph(program, graph)


def _check(node: fx.Node, twin: Callable[[fx.Node], Any] = lambda _: None) -> None:
    if node.op not in ("placeholder", "call_function", "output"):
        raise _Unusual(f"{node.op} {node.target}")
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        raise _Unusual(f"{node.target} has subgraphs")
    if _writes(node) and twin(node) is None:
        raise _Unusual(f"{node.target} writes")


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _twin(node: fx.Node, table: Table) -> Any:
    """The operator that gives what this one writes into its first input; None where others could see the writing."""
    written = node.args[0]
    if not isinstance(written, fx.Node):
        return None
    maker = _maker(written)
    fresh = isinstance(maker.target, torch._ops.OpOverload) and not any(
        _may_alias(one.target) for one in (maker, *written.users) if one != node
    )
    values = [argument.meta["val"] for argument in node.all_input_nodes]
    alike = {value.dtype for value in values if isinstance(value, torch.Tensor)} == {node.meta["val"].dtype}
    name, _, overload = str(node.target).removeprefix("aten.").rpartition("_.")
    found = getattr(getattr(torch.ops.aten, name, None), overload, None)
    return found if fresh and alike and found not in table else None


def _maker(tensor: fx.Node) -> fx.Node:
    """The node whose operator made a tensor: of several it made, where no other node stands for the same."""
    if tensor.target is not operator.getitem or not isinstance(several := tensor.args[0], fx.Node):
        return tensor
    same = [user for user in several.users if user.args == tensor.args]
    return several if len(same) == 1 else tensor


def _may_alias(target: Any) -> bool:
    """Whether what an operator returns may be its own input, written to or not."""
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    noted = [*target._schema.arguments, *target._schema.returns]
    return any(one.alias_info is not None for one in noted) or torch.Tag.maybe_aliasing_or_mutating in target.tags


def _is_composite_view(target: Any) -> bool:
    """Whether it may return its own input and is made of other operators: torch never leaves one as it is."""
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable or not _may_alias(target):
        return False
    name = target.name()  # type: ignore[no-untyped-call]
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


class _Traced:
    """What the table's functions did on the inputs of the chosen nodes.

    Args:
        inputs: nodes of the program -> placeholders of the trace.
        outputs: chosen node -> what stands for it in the trace: a node, or a tuple of nodes.
    """

    def __init__(self, inputs: dict[fx.Node, fx.Node], outputs: dict[fx.Node, Any]) -> None:
        self.program_node = {placeholder: node for node, placeholder in inputs.items()}
        self.outputs = outputs


def _trace(chosen: list[fx.Node], table: Table) -> _Traced:
    if not chosen:
        return _Traced({}, {})
    given = list(dict.fromkeys(argument for node in chosen for argument in node.all_input_nodes))
    values = [node.meta["val"] for node in given]
    mode = next(value.fake_mode for value in values if hasattr(value, "fake_mode"))

    def run(*inputs: Any) -> list[Any]:
        value_of = dict(zip(given, inputs, strict=True))
        results = []
        for node in chosen:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value_of.__getitem__)
            function: Any = table[node.target] if node.target in table else node.target
            results.append(function(*args, **kwargs))
            if results[-1] is NotImplemented:
                raise _Unusual(f"{node.target} is not decomposed here")
        return results

    known = dict(mode.shape_env.replacements)
    with torch.no_grad(), mode, enable_python_dispatcher():
        traced = make_fx(run, decomposition_table=dict(table.items()))(*values).graph
    found = mode.shape_env.replacements.items()  # a size may also be found to be another one, which fixes nothing
    if fixed := {size: value for size, value in found if value.is_number and known.get(size) != value}:
        # The program's own sizes are fixed with them, so torch's way would not do better.
        told = ", ".join(f"{size} = {value}" for size, value in fixed.items())
        raise UnsupportedError(f"a decomposition takes sizes of the example for the only ones: {told}")
    traced.eliminate_dead_code()  # sizes that only guards asked for
    for node in traced.find_nodes(op="call_function", target=torch.ops.aten.sym_numel.default):
        _by_axes(node)
    for node in traced.nodes:
        _check(node)
        if node.target in _OF_MEMORY:
            raise _Unusual(f"a decomposition asks for {node.target}, which no front end translates")
    placeholders = [node for node in traced.nodes if node.op == "placeholder"]
    (results,) = next(node for node in traced.nodes if node.op == "output").args
    return _Traced(dict(zip(given, placeholders, strict=True)), dict(zip(chosen, results, strict=True)))


def _by_axes(count: fx.Node) -> None:
    """The number of a tensor's elements, which no front end translates, as the product of its sizes."""
    tensor: Any = count.args[0]
    graph, value = count.graph, 1
    product: Any = None
    with graph.inserting_before(count):
        for axis, size in enumerate(tensor.meta["val"].shape):
            factor: Any = size
            if isinstance(size, torch.SymInt):
                factor = graph.call_function(torch.ops.aten.sym_size.int, (tensor, axis))
                factor.meta["val"] = size
            value = value * size
            if product is not None:
                factor = graph.call_function(operator.mul, (product, factor))
                factor.meta["val"] = value
            product = factor
    count.replace_all_uses_with(product)
    graph.erase_node(count)


class _Splice:
    """Builds the graph in which traced parts stand for chosen nodes."""

    def __init__(self, traced: _Traced, table: Table) -> None:
        self._traced, self._table = traced, table
        self._graph = fx.Graph()
        self._new: dict[fx.Node, Any] = {}  # node of the program or of the trace -> what stands for it here
        self._begun: set[fx.Node] = set()
        self._sizes: dict[str, fx.Node] = {}

    def of(self, nodes: list[fx.Node]) -> fx.Graph:
        """The program's nodes, in order, but for sizes that a part needs sooner."""
        for node in nodes:
            self._node(node)
        return self._graph

    def _node(self, node: Any) -> Any:
        """What stands for a node of the program."""
        if node not in self._new:
            if node in self._begun:
                raise _Unusual(f"{node} needs a size of what is made of it")
            self._begun.add(node)
            if node in self._traced.outputs:
                made = self._traced.outputs[node]
                self._new[node] = pytree.tree_map_only(fx.Node, lambda part: self._part(part, node), made)
            elif node.target is operator.getitem and isinstance(several := self._node(node.args[0]), list | tuple):
                self._new[node] = several[node.args[1]]
            elif _writes(node):  # from here on what was written to is what the twin gives
                copied = self._copy(node, self._node)
                copied.target = _twin(node, self._table)
                self._new[node.args[0]] = copied
            else:
                self._copy(node, self._node)
        return self._new[node]

    def _part(self, part: fx.Node, instead_of: fx.Node) -> Any:
        """What stands for a node of the trace."""
        if part in self._new:
            return self._new[part]
        if (size := _size(part)) in self._sizes:
            return self._sizes[size]
        if part.op == "placeholder":
            return self._node(self._traced.program_node[part])
        copied = self._copy(part, lambda needed: self._part(needed, instead_of))
        for key in ("nn_module_stack", "stack_trace"):
            if key in instead_of.meta:
                copied.meta.setdefault(key, instead_of.meta[key])
        return copied

    def _copy(self, node: fx.Node, new: Callable[[fx.Node], Any]) -> fx.Node:
        size = _size(node)
        if size not in self._sizes:
            copied = self._graph.node_copy(node, new)
            if size:
                self._sizes[size] = copied
        self._new[node] = standing = self._sizes[size] if size else copied
        return standing


def _size(node: fx.Node) -> str:
    """The size that a node computes, as text; empty for all that computes something else."""
    value = node.meta.get("val")
    return str(value.node.expr) if isinstance(value, torch.SymInt) else ""


def _with_graph(program: ExportedProgram, graph: fx.Graph) -> ExportedProgram:
    signature = copy.copy(program.graph_signature)
    outputs: Any = graph.output_node().args[0]
    signature.output_specs = [
        replace(spec, arg=TensorArgument(name=node.name))
        for spec, node in zip(signature.output_specs, outputs, strict=True)
    ]
    return ExportedProgram(
        root=fx.GraphModule(program.graph_module, graph),
        graph=graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
    )
