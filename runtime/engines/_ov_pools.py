"""Layers that share a pool of cache blocks, so that a paged graph has few inputs.

    block_indices · n + i  ->  attention of layer i of n        key_cache.<first>, value_cache.<first>  [blocks · n, …]

Block b of a row is n blocks of the pool, one for each layer.  With a pool of its own for every layer, a model of 30
layers has 60 inputs that never change, and the CPU plugin (2026.4.1) looks at every input before every run: a step of
SmolLM2-135M took 3 to 5 % more CPU time.  At most eight layers share a pool, because a pool that grows is in
memory twice while it is copied.

In: a model that `paged_attention_transformation` has rewritten.  Limits: layers share where their heads are of one
number and size, which is what decides the shape of a block.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import openvino as ov

_MOST = 8  # layers of a pool
_KEYS, _VALUES, _BLOCKS = 3, 4, 7  # inputs of the operator
_FORM = ("num_k_heads", "k_head_size", "num_v_heads", "v_head_size")


def share_pools(model: ov.Model) -> dict[str, int]:
    """Let layers share pools, in place; returns how many layers do, by name of a cache's input."""
    import openvino.opset15 as op

    readers = defaultdict[str, list[Any]](list)  # of every key cache; layers without one of their own share one already
    for node in model.get_ordered_ops():
        if node.get_type_name() == "PagedAttentionExtension":
            readers[node.input_value(_KEYS).any_name].append(node)
    alike = defaultdict[tuple[str, ...], list[str]](list)
    for name, nodes in readers.items():
        info = nodes[0].get_rt_info()
        alike[tuple(info[key].astype(str) if key in info else name for key in _FORM)].append(name)
    shared: dict[str, int] = {}
    for names in alike.values():
        for begin in range(0, len(names), _MOST):
            group = names[begin : begin + _MOST]
            first = readers[group[0]][0]
            keys, values = first.input_value(_KEYS), first.input_value(_VALUES)
            shared |= {keys.any_name: len(group), values.any_name: len(group)}
            if len(group) == 1:
                continue
            scaled = op.multiply(first.input_value(_BLOCKS), op.constant(np.int32(len(group))))
            for layer, name in enumerate(group):
                blocks = op.add(scaled, op.constant(np.int32(layer))) if layer else scaled
                given_up = [readers[name][0].input_value(port).get_node() for port in (_KEYS, _VALUES)] if layer else []
                for node in readers[name]:
                    node.input(_KEYS).replace_source_output(keys)
                    node.input(_VALUES).replace_source_output(values)
                    node.input(_BLOCKS).replace_source_output(blocks.output(0))
                for parameter in given_up:
                    model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()
    return shared
