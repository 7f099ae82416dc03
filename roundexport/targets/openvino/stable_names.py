"""Names that depend on a graph alone, so that equal exports give equal bytes.

OpenVINO names models and nodes by a counter of the process ("Reshape_5356"); that number is replaced by the node's
place in the order of the graph.  Where equal nodes were merged, which of them gave the survivor its name depends on
addresses in memory; it takes the first of their names, all of which its tensor still has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import openvino as ov

_COUNTED = re.compile(r"[A-Za-z][A-Za-z0-9]*_\d+(\.\d+)?")


def stable_names(model: ov.Model, name: str) -> None:
    """Name the model, and rename every node and tensor that carries a counter, in place."""
    model.set_friendly_name(name)
    for position, node in enumerate(model.get_ordered_ops()):
        old = node.get_friendly_name()
        if not _COUNTED.fullmatch(old):
            node.set_friendly_name(first_of_merged(old, [name for port in node.outputs() for name in port.get_names()]))
            continue
        new = f"{node.get_type_name()}_{position}"
        node.set_friendly_name(new)
        for port in node.outputs():
            names = port.get_names()
            if old in names:
                port.get_tensor().set_names({new if tensor == old else tensor for tensor in names})


def first_of_merged(name: str, tensors: Iterable[str]) -> str:
    """The name of a node, ``<traced>/<operator>``, with the first of the traced names that its tensors have.

    Args:
        name: as it is, ``unsqueeze_1/aten.unsqueeze.default/Unsqueeze``.
        tensors: names of its outputs, among them ``unsqueeze:0``, ``unsqueeze_1:0``.
    """
    traced, slash, rest = name.partition("/")
    merged = {tensor.partition(":")[0] for tensor in tensors if ":" in tensor}
    return f"{min(merged)}{slash}{rest}" if slash and traced in merged else name
