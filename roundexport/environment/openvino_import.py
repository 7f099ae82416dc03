"""Importing OpenVINO without its telemetry.

Imported, OpenVINO sends an event to a statistics service, and converting a model sends more; each is a DNS look-up and
a request that nobody asked for.  Where the package ``openvino_telemetry`` is missing, OpenVINO uses a stub of its own;
so the package is hidden while OpenVINO is imported for the first time.  Whoever wants the telemetry imports openvino
before roundexport does.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_TELEMETRY = "openvino_telemetry"


def import_openvino() -> ModuleType:
    """The module ``openvino``, with OpenVINO's own stub for telemetry if it is imported here first.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    modules: dict[str, Any] = sys.modules
    before = {name: modules.pop(name) for name in list(modules) if name.partition(".")[0] == _TELEMETRY}
    modules[_TELEMETRY] = None  # an import of it fails, as if it were not installed
    try:
        return importlib.import_module("openvino")
    finally:
        del modules[_TELEMETRY]
        modules.update(before)
