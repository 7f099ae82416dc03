"""The net under every verb: what went wrong as one line on stderr, and an exit code.

    deliberate errors     their own text and code (errors.py)          out of memory    4
    Ctrl-C                130, with what was kept and how to go on     anything else    1, and how to see the trace

``ROUNDEXPORT_TRACE=1`` prints the trace of whatever fails.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from roundexport.errors import RoundexportError, WontFitError

from . import printing

TRACE = "ROUNDEXPORT_TRACE"
INTERRUPTED = 130
_EXTRAS = {
    "torch": "tune", "transformers": "tune", "onnxruntime": "onnx", "openvino": "openvino",
    "onnx": "export-onnx", "onnx_ir": "export-onnx", "onnxscript": "export-onnx",
    "openvino_tokenizers": "export-openvino", "llguidance": "grammar",
    "ray": "cluster",
    "starlette": "serve", "uvicorn": "serve", "msgspec": "serve", "prometheus_client": "serve", "httpx": "serve",
}  # fmt: skip
_KEPT = {
    "tune": "finished blocks are kept; run the same command again to go on",
    "convert": "finished parts are kept in the output folder; run the same command again to go on",
    "sweep": "finished runs are kept in the output folder; run the same command again to go on",
    "export": "nothing was written; run the same command again",
    "verify": "figures are not kept; what the float model says of the text is, once all of it was scored",
    "list": "with --record, families that were tried are kept; run the same command again to go on",
    "bench": "times of packages are not kept; those of --kernels are, shape by shape",
}


def guarded(verb: Callable[[], None]) -> None:
    """Run a verb; whatever it raises becomes a message and the process's exit code."""
    try:
        verb()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # the command-line library has turned Ctrl-C into this, without a word
            printing.failure(f"interrupted{_kept()}")
        raise
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(told(error))


def told(error: BaseException) -> int:
    """Print an error's message, and its trace where that is asked for; returns its exit code."""
    code, text = explain(error)
    if os.environ.get(TRACE, "0") not in ("", "0"):
        traceback.print_exception(error)
    printing.failure(text)
    return code


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message of an error."""
    if isinstance(error, RoundexportError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, f"interrupted{_kept()}"
    if isinstance(error, MemoryError) or "not enough memory" in str(error):
        advice = "use fewer samples, a smaller batch or --max-ram, or a machine with more"
        return WontFitError.exit_code, f"out of memory{_detail(error)}; {advice}"
    if isinstance(error, ImportError):
        return 1, _missing(error)
    if isinstance(error, OSError):
        return 1, str(error)
    return 1, f"unexpected {type(error).__name__}{_detail(error)}; set {TRACE}=1 to see where, and report it"


def _detail(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f": {text[:500]}" if text else ""


def _kept() -> str:
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    return f"; {_KEPT[verb]}" if verb in _KEPT else ""


def _missing(error: ImportError) -> str:
    extra = _EXTRAS.get((error.name or "").partition(".")[0])
    advice = f"; install it with: pip install 'roundexport[{extra}]'" if extra else ""
    return f"this command needs a package that is not installed{advice} ({error})"
