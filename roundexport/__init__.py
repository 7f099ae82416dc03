"""roundexport: tuned low-bit transformers as ONNX and OpenVINO packages that run fast on Intel CPUs and GPUs.

    import roundexport
    roundexport.convert("path/to/model", "out", to=["onnx", "openvino"])

The functions below have the names and parameters of the command line's verbs.  They are imported when first used, so
that ``import roundexport`` and ``roundexport.runtime`` stay free of torch and transformers.

In a checkout `runtime/` and `kernels/` lie beside this folder.  An installation maps them; where Python finds the
checkout itself, as in its own root, they are found through ``__path__``.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversion.convert import convert
    from .conversion.importing import import_checkpoint
    from .conversion.inspection import inspect
    from .conversion.tune import tune
    from .model.checkpoint import Checkpoint
    from .rewriting.rewrite import rewrite
    from .runtime import bench, generate, load
    from .sweeps.entry import sweep
    from .targets.export import export
    from .tuning.settings import TuneSettings
    from .verification.verify import verify

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "runtime" / "types.py").is_file() and (_ROOT / "pyproject.toml").is_file():
    __path__.append(str(_ROOT))

__version__ = "0.1.0"
__all__ = [
    "Checkpoint",
    "TuneSettings",
    "bench",
    "convert",
    "export",
    "generate",
    "import_checkpoint",
    "inspect",
    "load",
    "rewrite",
    "sweep",
    "tune",
    "verify",
]

_HOME = {
    "Checkpoint": ".model.checkpoint",
    "TuneSettings": ".tuning.settings",
    "bench": ".runtime",
    "convert": ".conversion.convert",
    "export": ".targets.export",
    "generate": ".runtime",
    "import_checkpoint": ".conversion.importing",
    "inspect": ".conversion.inspection",
    "load": ".runtime",
    "rewrite": ".rewriting.rewrite",
    "sweep": ".sweeps.entry",
    "tune": ".conversion.tune",
    "verify": ".verification.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
