"""roundexport: tuned low-bit transformers as ONNX and OpenVINO packages that run fast on Intel CPUs and GPUs.

    import roundexport
    roundexport.convert("path/to/model", "out", to=["onnx", "openvino"])

The functions below have the names and parameters of the command line's verbs.  They are imported when first used, so
that ``import roundexport`` and ``roundexport.runtime`` stay free of torch and transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .converting import convert
    from .exporting import export
    from .inspecting import inspect
    from .quality import verify
    from .runtime import bench, generate, load
    from .settings import TuneSettings
    from .tuning import tune

__version__ = "0.1.0"
__all__ = ["TuneSettings", "bench", "convert", "export", "generate", "inspect", "load", "tune", "verify"]

_HOME = {
    "TuneSettings": ".settings",
    "bench": ".runtime",
    "convert": ".converting",
    "export": ".exporting",
    "generate": ".runtime",
    "inspect": ".inspecting",
    "load": ".runtime",
    "tune": ".tuning",
    "verify": ".quality",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
