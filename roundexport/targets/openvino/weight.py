"""Rule: a module's weight as a node that gives float32 [N, K], compressed where the artifact holds it.

The chain is NNCF's, node for node and name for name, because that is what plugins keep compressed:

    Constant  u2|u4|i4|u8|i8 [N, G, K/G]    "<module>.weight"
    Convert   f16
    Subtract  Convert f16 (Constant [N, G, 1] "<module>.weight/zero_point")     only where the type has no implicit one;
              Constant f16 [N, G, 1] or [1, 1, 1] where activations stay floats (float_products.py)
    Multiply  Constant f16 [N, G, 1]        "<module>.weight/scale"
    Reshape   [N, K]                        only when grouped
    Convert   f32

Artifacts with float32 scales use f32 in place of f16 and need no last Convert; powers of two (exponent8) are written as
f16 where it holds them and every weight exactly, else as f32.  One group per row: constants [N, K] and
[N, 1].  Modules that share one weight share the chain: a MatMul and a Gather on one chain both stay compressed.

A weight that is kept float is stored in the smallest type that holds it exactly (constants.py), so nothing is rounded.
Source: nncf/quantization/algorithms/weight_compression/openvino_backend.py (3.4); the runtime graph is what proves it.
"""

from __future__ import annotations

from typing import Any

import openvino as ov
from openvino import opset15 as ops

from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import LayerKind
from roundexport.targets.weight_source import NoWeights

from .constants import (
    Stored,
    code_bytes,
    exact_constant,
    float_constant,
    float_zero_points,
    needs_zero_point,
    packed_constant,
    stored_name,
    stored_type,
    target_scales,
    zero_point_constant,
)
from .float_products import unsigned
from .graph import Graph, integers, scalar

NOT_TUNED = "not in the artifact"


def weight_node(graph: Graph, module: str) -> Any:
    """The node that gives a module's weight, float32 [N, K]; shared by all modules that own the same weight."""
    owner = graph.weights.owner(module)
    if owner is not None:
        return graph.once(("weight", owner), lambda: _compressed(graph, owner))
    graph.kept_float.setdefault(module, NOT_TUNED)
    name = _first_of_tied(graph, module)
    return graph.once(("weight", name), lambda: _float(graph, name))


def _compressed(graph: Graph, owner: str) -> Any:
    linear = graph.weights.quantized(owner)
    kind: LayerKind = "embedding" if any(info.name == owner for info in graph.capture.embeddings) else "linear"
    stored = stored_type(linear.spec, linear.in_features, kind, graph.device)
    spared = owner in graph.float_products
    graph.used[owner] = stored_name(unsigned(stored) if spared else stored, linear.spec)
    port = 0 if kind == "embedding" else 1
    return compressed_chain(linear, stored, f"{owner}.weight", port, float_activations=spared)


def compressed_chain(
    linear: QuantizedLinear, stored: Stored, name: str, port: int = 1, *, float_activations: bool = False
) -> Any:
    """Build the chain for one weight.

    Args:
        linear: the integers.
        stored: OpenVINO type to hold them.
        name: friendly name of the weight constant; the others are derived from it.
        port: input of the consumer that the weight feeds, part of a name: 1 MatMul, 0 Gather.
        float_activations: whether products with it keep activations as floats (float_products.py).
    """
    stored = unsigned(stored) if float_activations else stored
    rows, groups, grouped = linear.out_features, linear.groups, linear.groups > 1
    scales = target_scales(linear)
    narrow = ov.Type(scales.dtype)
    shape = (rows, groups, linear.in_features // groups) if grouped else (rows, linear.in_features)
    per_group = (rows, groups, 1) if grouped else (rows, 1)
    node = ops.convert(packed_constant(stored, shape, code_bytes(linear, stored), name), narrow)
    if float_activations:
        zero = float_zero_points(linear.full_zero_points(), scales.dtype, per_group, f"{name}/zero_point")
        node = ops.subtract(node, zero, name=f"{name}/zero_point/subtract")
    elif needs_zero_point(linear.spec, stored):
        zero = zero_point_constant(linear.full_zero_points(), stored, per_group, f"{name}/zero_point")
        node = ops.subtract(node, ops.convert(zero, narrow), name=f"{name}/zero_point/subtract")
    scale = float_constant(scales.reshape(per_group), f"{name}/scale")
    node = ops.multiply(node, scale, name=f"{name}/fq_weights_{port}")
    if grouped:
        node = ops.reshape(node, integers(rows, linear.in_features), False)
    if narrow == ov.Type.f16:
        node = ops.convert(node, ov.Type.f32, name=f"{name}/fq_weights_{port}/convert")
    return node


def _float(graph: Graph, module: str) -> Any:
    if isinstance(graph.weights, NoWeights):
        return _shape_only(graph, module)
    constant = exact_constant(graph.weights.float_weight(module), f"{module}.weight")
    if constant.get_element_type() == ov.Type.f32:
        return constant
    return ops.convert(constant, ov.Type.f32)


def _shape_only(graph: Graph, module: str) -> Any:
    """A node of the weight's shape that holds no memory; random, so that the front end does not compute it."""
    info = next(info for info in (*graph.capture.linears, *graph.capture.embeddings) if info.name == module)
    shape = integers(info.out_features, info.in_features)
    return ops.random_uniform(shape, scalar(0.0), scalar(1.0), ov.Type.f32.get_type_name())


def _first_of_tied(graph: Graph, module: str) -> str:
    """The embedding that a module is tied to, or the module itself."""
    return next((info.name for info in graph.capture.embeddings if module in info.shared_with), module)
