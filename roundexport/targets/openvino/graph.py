"""What the lowering rules share while one program is converted: weights, shared nodes, KV state, and the tally.

A rule is a module with ``PLACEHOLDER``, the operator's name, and ``lower(graph, call)``, which gives the operator's
outputs; `Call` reads the placeholder's arguments.  Nodes that many layers need (a compressed weight used twice, an
attention mask, beam_idx) are made once, here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
from openvino import opset15 as ops

if TYPE_CHECKING:
    from roundexport.graph.capture import Capture
    from roundexport.targets.weight_source import WeightSource


@dataclass(frozen=True)
class Call:
    """One placeholder as OpenVINO's front end hands it over.

    Args:
        context: the front end's node context.
    """

    context: Any

    def tensor(self, position: int) -> Any:
        """A tensor argument, as an openvino output."""
        return self.context.get_input(position)

    def optional(self, position: int) -> Any | None:
        """A tensor argument, or None where the program passes None."""
        value = self.context.get_input(position)
        # The front end keeps None as a node of its own that no operator set has.
        return None if value.get_node().get_type_name() == "PtFrameworkNode" else value

    def number(self, position: int) -> float:
        """A number argument."""
        return float(np.ravel(self.context.get_values_from_const_input(position))[0])

    def index(self, position: int) -> int:
        """An integer argument."""
        return int(self.number(position))


@dataclass
class Graph:
    """State of one conversion.

    Args:
        capture: the program and the tables its placeholders point into.
        weights: integers and floats by module name.
        device: ``cpu`` or ``gpu``; decides how 2-bit codes are stored.
        float_products: artifact layers whose activations stay floats (float_products.py).
        shared: nodes made once and used by several layers.
        sinks: writes to the KV state.
        variables: the KV state.
        used: artifact layers in the graph -> OpenVINO type of their constant.
        kept_float: modules whose weight is in the graph as floats -> reason.
        fusions: rule -> number of places.
        refused: (rule, reason) where a rule had to fall back on plain operators.
    """

    capture: Capture
    weights: WeightSource
    device: str
    float_products: frozenset[str] = frozenset()
    shared: dict[Any, Any] = field(default_factory=dict)
    sinks: list[Any] = field(default_factory=list)
    variables: list[Any] = field(default_factory=list)
    used: dict[str, str] = field(default_factory=dict)
    kept_float: dict[str, str] = field(default_factory=dict)
    fusions: Counter[str] = field(default_factory=Counter)
    refused: list[tuple[str, str]] = field(default_factory=list)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """The node of this key, made at the first request."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def release(self) -> None:
        """Let go of every node, so that the constants' memory is freed with the model."""
        self.shared.clear()
        self.sinks.clear()
        self.variables.clear()


def integers(*values: int) -> Any:
    """A constant int64 vector."""
    return ops.constant(np.array(values, np.int64))


def integer(value: int) -> Any:
    """A constant int64 scalar."""
    return ops.constant(np.array(value, np.int64))


def scalar(value: float) -> Any:
    """A constant float32 scalar."""
    return ops.constant(np.array(value, np.float32))


def dimension(x: Any, axis: int) -> Any:
    """Length of one axis, int64 [1]."""
    return ops.gather(ops.shape_of(x, ov.Type.i64), integers(axis), integer(0))
