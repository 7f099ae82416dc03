"""What every rule needs to look at a graph and change it.

A rule is one module: it finds its pattern, checks it, rewrites it and counts that, or notes why it could not.  Values
carry full shapes (ints, or names such as ``batch`` for the dynamic axes), which rules set on what they add.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from numpy.typing import NDArray

PLACEHOLDER = "roundexport"
MICROSOFT = "com.microsoft"
Dim = int | str


@dataclass
class Log:
    """What the rules did: counts by rule, and patterns found that could not be rewritten, with the reason."""

    fusions: Counter[str] = field(default_factory=Counter)
    refused: list[tuple[str, str]] = field(default_factory=list)


class Editor:
    """A model being rewritten.

    Args:
        model: changed in place.
        prefix: of the names of constants that are added.
    """

    def __init__(self, model: ir.Model, prefix: str = "") -> None:
        self._prefix = prefix
        self.model = model
        self.graph = model.graph
        self.log = Log()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._numbers = itertools.count()
        self._named: Counter[str] = Counter()

    def nodes(self, op_type: str, domain: str = "") -> list[ir.Node]:
        """All nodes of one kind, in order."""
        return [node for node in self.graph if node.op_type == op_type and node.domain == domain]

    def all_nodes(self) -> list[ir.Node]:
        """All nodes, those of branches and loops too."""
        return list(ir.traversal.RecursiveGraphIterator(self.graph))

    def insert(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shapes: Sequence[Sequence[Dim] | None],
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
        dtype: ir.DataType = ir.DataType.FLOAT,
        name: str | None = None,
    ) -> list[ir.Value]:
        """Add a node in front of another and return its outputs, one per shape; a None shape is an unused output.

        A name that is taken gets a number, as ONNX Runtime wants each once: blocks may be run several times.
        """
        if name is not None:
            self._named[name] += 1
            name = name if self._named[name] == 1 else f"{name}_{self._named[name]}"
        node = ir.node(op_type, inputs, dict(attributes or {}), domain=domain, num_outputs=len(shapes), name=name)
        for output, shape in zip(node.outputs, shapes, strict=True):
            if shape is None:
                output.name = ""
                continue
            output.shape, output.dtype = ir.Shape(list(shape)), dtype
        (before.graph or self.graph).insert_before(before, node)
        return list(node.outputs)

    def constant(self, values: NDArray[Any] | Sequence[int], name: str = "constant") -> ir.Value:
        """A small initializer; equal ones are one."""
        array = np.asarray(values, np.int64) if not isinstance(values, np.ndarray) else values
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            label = f"{self._prefix}{name}_{next(self._numbers)}"
            self._constants[key] = self.initializer(label, ir.tensor(array, name=label))
        return self._constants[key]

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Register a tensor as initializer."""
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let everything that reads ``old`` read ``new``; a graph output keeps its name."""
        if old.is_graph_output():
            name, old.name = old.name, f"{old.name}_replaced"
            new.name = name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)

    def remove(self, node: ir.Node) -> None:
        """Remove a node whose outputs nobody reads."""
        self.graph.remove(node, safe=True)

    def sweep(self) -> None:
        """Drop nodes and initializers that nobody reads, and opsets that nobody uses."""
        passes.RemoveUnusedNodesPass()(self.model)
        live = set(self.graph.initializers.values())
        self._constants = {key: value for key, value in self._constants.items() if value in live}

    def first(self) -> ir.Node:
        """The first node: what is inserted before it depends on inputs and initializers alone."""
        return self.graph[0]


def dims(value: ir.Value) -> tuple[Dim, ...] | None:
    """Shape of a value with names for its dynamic axes; None where it is not fully known."""
    if value.shape is None:
        return None
    found: list[Dim] = []
    for dim in value.shape:
        if isinstance(dim, int):
            found.append(dim)
        elif dim.value is None:
            return None
        else:
            found.append(str(dim.value))
    return tuple(found)


def made_by(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that makes a value, if it is of this kind."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain == domain else None


def optional(node: ir.Node, position: int) -> ir.Value | None:
    """An input that may be left out."""
    return node.inputs[position] if position < len(node.inputs) else None


def array(value: ir.Value | None) -> NDArray[Any] | None:
    """Numbers of a constant value, or None."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    numbers: NDArray[Any] = value.const_value.numpy()
    return numbers


def integer(node: ir.Node, name: str, default: int | None = None) -> int:
    """An integer attribute."""
    attribute = node.attributes.get(name)
    return int(attribute.as_int()) if attribute is not None or default is None else default


def integers(node: ir.Node, name: str) -> tuple[int, ...]:
    """A list of integers."""
    return tuple(node.attributes[name].as_ints())


def number(node: ir.Node, name: str) -> float:
    """A float attribute."""
    return float(node.attributes[name].as_float())
