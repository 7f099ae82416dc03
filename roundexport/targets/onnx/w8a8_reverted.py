"""A graph with QuantizeLinear and DequantizeLinear, some of whose linears read floats again.

    MatMul(DQ(Q(x)), DQ(w))  →  MatMul(x, weight)          Gather(DQ(table), ids)  →  Gather(table, ids)

Tensors go by the names that they have in the float graph; what nothing reads any more is dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx

_PAIR = ("DequantizeLinear", "QuantizeLinear")


def reverted(
    quantized: onnx.ModelProto, floats: Mapping[str, onnx.TensorProto], weight_input: Mapping[str, int],
    nodes: Collection[str],
) -> onnx.ModelProto:  # fmt: skip
    """A copy in which the nodes of these names are float.

    Args:
        quantized: the model.
        floats: the float weight of a node, by its name.
        weight_input: which input of an operator is a weight.
        nodes: names of nodes.
    """
    model = onnx.ModelProto()
    model.CopyFrom(quantized)
    graph = model.graph
    made_by = {output: node for node in graph.node for output in node.output}
    held = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.name not in nodes:
            continue
        weight = weight_input[node.op_type]
        for place in range(len(node.input)):
            if place == weight:
                node.input[place] = floats[node.name].name
                if floats[node.name].name not in held:
                    graph.initializer.append(floats[node.name])
                    held.add(floats[node.name].name)
            else:
                node.input[place] = _before(node.input[place], made_by)
    _drop_unread(graph)
    return model


def _before(tensor: str, made_by: Mapping[str, onnx.NodeProto]) -> str:
    """What was rounded to give this tensor; itself where nothing was."""
    name = tensor
    for operator in _PAIR:
        node = made_by.get(name)
        if node is None or node.op_type != operator:
            return tensor
        name = node.input[0]
    return name


def _drop_unread(graph: onnx.GraphProto) -> None:
    kept = {value.name for value in graph.output}
    while True:
        read = kept.union(*(node.input for node in graph.node))
        left = [node for node in graph.node if node.op_type not in _PAIR or read & set(node.output)]
        if len(left) == len(graph.node):
            break
        del graph.node[:]
        graph.node.extend(left)
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
