"""The graph of a decoder's first step, for clients that hand the encoder's hidden states to the decoder (optimum).

    decoder_model.onnx    input_ids, encoder_hidden_states, encoder_attention_mask (where the encoder has a mask)
                          ──▶ logits, present.<i>.decoder.key|value, present.<i>.encoder.key|value

It is decoder_with_past_model.onnx behind an empty cache, with those nodes of encoder_model.onnx in front that make keys
and values of cross-attention from hidden states.  Both data files are read, and no weight is written again.

Source: modeling_seq2seq.py of optimum-onnx 0.1.0, which runs this file once and decoder_with_past_model.onnx for every
further token, whose caches it hands over in the order of that graph's inputs (cross_attention.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from roundexport.errors import UnsupportedError
from roundexport.formats.package import LAYERS_KEY

from .settings import DECODER_FILE, ENCODER_FILE, FIRST_FILE

_HIDDEN, _STATES = "last_hidden_state", "encoder_hidden_states"
_PAST, _PRESENT = "past_key_values.", "present."


def write_first_step(out: Path) -> tuple[str, ...]:
    """Write decoder_model.onnx beside the two graphs that it is made of.

    Args:
        out: package folder.

    Returns:
        Layers that the nodes in front hold, once for every place.

    Raises:
        UnsupportedError: keys and values are made of more than hidden states.
    """
    encoder = onnx.load(out / ENCODER_FILE, load_external_data=False).graph
    model = onnx.load(out / DECODER_FILE, load_external_data=False)
    graph = model.graph
    presents = [value for value in encoder.output if value.name.startswith(_PRESENT)]
    front = _behind_hidden_states(encoder, {value.name for value in presents})
    taken = {tensor.name for tensor in graph.initializer} | {name for node in graph.node for name in node.output}
    names = {_HIDDEN: _STATES, **{value.name: value.name for value in presents}}
    inside = [name for node in front for name in (*node.output, *node.input) if name]
    for name in inside:
        names.setdefault(name, f"encoder/{name}" if name in taken else name)
    wanted, initializers = set(inside), []
    for tensor in encoder.initializer:
        if tensor.name in wanted:
            tensor.name = names[tensor.name]
            initializers.append(tensor)
    for node in front:
        node.name = f"encoder/{node.name}"
        _rename(node, names)
    cross = {value.name.replace(_PRESENT, _PAST): value.name for value in presents}
    own = [value for value in graph.input if value.name.startswith(_PAST) and value.name not in cross]
    empty, constants, pasts = _empty_caches(own)
    for node in graph.node:
        _rename(node, cross | pasts)
    inputs = [value for value in graph.input if not value.name.startswith(_PAST)]
    hidden = next(value for value in encoder.output if value.name == _HIDDEN)
    width = hidden.type.tensor_type.shape.dim[-1].dim_value
    shape = ["batch_size", "encoder_sequence_length", width]
    inputs.insert(1, helper.make_tensor_value_info(_STATES, TensorProto.FLOAT, shape))
    _replace(graph.node, [*front, *empty, *graph.node])
    _replace(graph.input, inputs)
    graph.output.extend(presents)
    graph.initializer.extend([*initializers, *constants])
    (out / FIRST_FILE).write_bytes(model.SerializeToString())
    return tuple(_layers(front))


def _behind_hidden_states(graph: onnx.GraphProto, outputs: set[str]) -> list[onnx.NodeProto]:
    """Nodes between the hidden states and some outputs, in their order."""
    stored = {tensor.name for tensor in graph.initializer} | {_HIDDEN, ""}
    makers = {name: node for node in graph.node for name in node.output}
    needed, todo = set(), list(outputs)
    while todo:
        name = todo.pop()
        if name in stored or name in needed:
            continue
        if name not in makers:
            raise UnsupportedError(
                f"the decoder reads {name} of the encoder, and its hidden states are all that a first step is given"
            )
        needed |= set(makers[name].output)
        todo.extend(makers[name].input)
    return [node for node in graph.node if needed & set(node.output)]


def _empty_caches(
    inputs: list[onnx.ValueInfoProto],
) -> tuple[list[onnx.NodeProto], list[TensorProto], dict[str, str]]:
    """Nodes that make caches without tokens, their constants, and which of them stands for which input."""
    begin, rows = "first/begin", "first/rows"
    nodes = [
        helper.make_node("Shape", ["input_ids"], ["first/shape"]),
        helper.make_node("Gather", ["first/shape", begin], [rows]),
    ]
    constants = [numpy_helper.from_array(np.zeros(1, np.int64), begin)]
    caches: dict[str, str] = {}
    for value in inputs:
        kind = value.type.tensor_type
        heads, width = (kind.shape.dim[axis].dim_value for axis in (1, 3))
        name = f"first/{kind.elem_type}.{heads}.{width}"
        if name not in caches.values():
            sizes, shape = f"{name}/sizes", f"{name}/shape"
            zero = helper.make_tensor("zero", kind.elem_type, [1], [0])
            constants.append(numpy_helper.from_array(np.array([heads, 0, width], np.int64), sizes))
            nodes.append(helper.make_node("Concat", [rows, sizes], [shape], axis=0))
            nodes.append(helper.make_node("ConstantOfShape", [shape], [name], value=zero))
        caches[value.name] = name
    return nodes, constants, caches


def _layers(nodes: list[onnx.NodeProto]) -> Iterator[str]:
    """Names in the metadata of nodes that hold layers."""
    for node in nodes:
        for entry in node.metadata_props:
            if entry.key == LAYERS_KEY:
                yield from (name for name, *_ in json.loads(entry.value))


def _rename(node: onnx.NodeProto, names: dict[str, str]) -> None:
    _replace(node.input, [names.get(name, name) for name in node.input])
    _replace(node.output, [names.get(name, name) for name in node.output])


def _replace(field: Any, values: list[Any]) -> None:
    """Put other values into a repeated field."""
    del field[:]
    field.extend(values)
