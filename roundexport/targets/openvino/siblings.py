"""Linears that read the same value become one: rows one below the other, results cut apart.

    y1 = W1 x, y2 = W2 x    ->    VariadicSplit([W1; W2] x, axis -1, [N1, N2])

Rows of a quantized weight are independent, so this is exact.  The constant and what belongs to it are named after all
layers, "<first>+<second>.weight", and the lengths of the split say which rows are whose (readback.py).

The CPU plugin (2026.4.1) hands every product to its threads anew, which costs small models more than the split: the
products of SmolLM2-135M's blocks for one token took 5.7 ms apart and 4.9 together on one thread, 5.2 and 4.1 on two
(least of 160, by hand; AMD EPYC with AVX-512 and BF16); at the shapes of Qwen3-0.6B 5.9 and 5.5, 3.7 and 3.6.  Only
weights of one form are merged; tied ones and those that are used twice stay whole for all their readers, and so do
those that read nothing of the tokens (keys and values of cross-attention): a state begins with what they give, and the
plugin cannot move nodes of several outputs there.  The GPU plugin merges siblings by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from openvino import opset15 as ops

from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import LinearInfo

from .constants import JOINED, float_constant, stored_name, stored_type
from .float_products import unsigned
from .graph import Graph, integer, integers
from .weight import compressed_chain


def siblings(graph: Graph, index: int) -> tuple[int, ...]:
    """The linears that are computed together with one, itself among them, in the order of the program."""
    together: dict[int, tuple[int, ...]] = graph.once("siblings", lambda: _groups(graph))
    return together.get(index, (index,))


def part(graph: Graph, x: Any, index: int, together: tuple[int, ...]) -> Any:
    """The output of one of several siblings for their input; the product is made for the first that is asked for."""
    infos = [graph.capture.linears[one] for one in together]
    return graph.once(("siblings", together), lambda: _parts(graph, x, infos))[together.index(index)]


def _parts(graph: Graph, x: Any, infos: Sequence[LinearInfo]) -> list[Any]:
    names = [info.name for info in infos]
    label = JOINED.join(names)
    each = [graph.weights.quantized(name) for name in names]
    stored = stored_type(each[0].spec, each[0].in_features, "linear", graph.device)
    spared = names[0] in graph.float_products
    graph.used |= dict.fromkeys(names, stored_name(unsigned(stored) if spared else stored, each[0].spec))
    graph.fusions["merged linears"] += 1
    chain = compressed_chain(_stacked(each), stored, f"{label}.weight", float_activations=spared)
    biased = [name in graph.capture.biased for name in names]
    y = ops.matmul(x, chain, False, True, name=f"{label}/product" if any(biased) else label)
    if any(biased):
        biases = [
            graph.weights.bias(info.name) if has else np.zeros(info.out_features, np.float32)
            for info, has in zip(infos, biased, strict=True)
        ]
        y = ops.add(y, float_constant(np.concatenate(biases), f"{label}.bias"), name=label)
    lengths = integers(*(info.out_features for info in infos))
    return list(ops.variadic_split(y, integer(-1), lengths, name=f"{label}/parts").outputs())


def _form(graph: Graph, info: LinearInfo) -> object | None:
    """Equal for linears that can be merged; None for one that cannot."""
    owner = graph.weights.owner(info.name)
    if graph.device != "cpu" or owner != info.name or info.shared_with or graph.weights.entering(owner) is not None:
        return None
    return info.in_features, graph.weights.spec(owner), owner in graph.float_products


def _groups(graph: Graph) -> dict[int, tuple[int, ...]]:
    program, uses = graph.capture.program, graph.capture.uses()
    moving = {program.graph_signature.user_inputs[0]}  # names of nodes that depend on the tokens
    found: dict[object, list[int]] = {}
    for node in program.graph.nodes:
        moving.update({node.name} if any(read.name in moving for read in node.all_input_nodes) else ())
        if node.target is torch.ops.roundexport.linear.default and node.args[0].name in moving:
            index = node.args[1]
            info = graph.capture.linears[index]
            kind = _form(graph, info) if uses[info.name] == 1 else None
            if kind is not None:
                found.setdefault((node.args[0], kind), []).append(index)
    return {index: tuple(group) for group in found.values() if len(group) > 1 for index in group}


def _stacked(linears: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """Rows of all, one below the other."""
    first = linears[0]
    points = [linear.zero_points for linear in linears if linear.zero_points is not None]
    return QuantizedLinear(
        first.spec,
        first.in_features,
        np.concatenate([linear.codes for linear in linears]),
        np.concatenate([linear.scales for linear in linears]),
        np.concatenate(points) if points else None,
    )
