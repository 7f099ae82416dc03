"""Names that depend on a graph alone, so that equal exports give equal bytes.

OpenVINO names models and nodes by a counter of the process ("Reshape_5356"); that number is replaced by the node's
place in the order of the graph.
"""

from __future__ import annotations

import re

import openvino as ov

_COUNTED = re.compile(r"[A-Za-z][A-Za-z0-9]*_\d+(\.\d+)?")


def stable_names(model: ov.Model, name: str) -> None:
    """Name the model, and rename every node and tensor that carries a counter, in place."""
    model.set_friendly_name(name)
    for position, node in enumerate(model.get_ordered_ops()):
        old = node.get_friendly_name()
        if not _COUNTED.fullmatch(old):
            continue
        new = f"{node.get_type_name()}_{position}"
        node.set_friendly_name(new)
        for port in node.outputs():
            names = port.get_names()
            if old in names:
                port.get_tensor().set_names({new if tensor == old else tensor for tensor in names})
