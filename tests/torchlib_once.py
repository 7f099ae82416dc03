"""What torch reads anew for every export, read once a process.

    ONNX operators             `torch.onnx.export` parses some 500 of onnxscript into a registry each time, a fifth of
                               what the export of a toy takes.  The registry differs between exports only in what is
                               registered on top, so each export gets a copy
    composite operators        a table of decompositions looks up every operator of every library once for each
                               library, a fifth of what is left of a translation.  All have been looked up after the
                               first time
    members of protocols       onnx_ir asks for every value that it makes whether it has all of a protocol's, which
                               Python up to 3.11 collects anew each time

Importing this module is enough; where torch's private parts have moved nothing is done and tests are just slower.
"""

from __future__ import annotations

import functools
import typing
from typing import Any

from torch._export import utils
from torch.onnx._internal.exporter import _registration


def _install() -> None:
    registry = getattr(_registration, "ONNXRegistry", None)
    original = getattr(registry, "from_torchlib", None)
    if registry is None or original is None:
        return
    whole = functools.cache(original)

    def copied(*asked: Any, **named: Any) -> Any:
        known, fresh = whole(*asked, **named), registry()
        vars(fresh).update(vars(known))
        fresh.functions = {target: list(forms) for target, forms in known.functions.items()}
        return fresh

    registry.from_torchlib = staticmethod(copied)
    if (look_up := getattr(utils, "_materialize_cpp_cia_ops", None)) is not None:
        utils._materialize_cpp_cia_ops = functools.cache(look_up)  # type: ignore[assignment]
    if (members := getattr(typing, "_get_protocol_attrs", None)) is not None:
        typing._get_protocol_attrs = functools.cache(members)  # type: ignore[attr-defined]


_install()
