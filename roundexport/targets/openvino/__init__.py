"""The OpenVINO target: compressed-weight graphs that plugins, openvino_genai and optimum-intel load as they are.

One captured program becomes one stateful graph for prefill and decode.  Each rule is a file: weight (the compressed
chain), linear, embedding, attention (with its KV state), mask, rope, rms_norm.  lowering.py puts them together,
export.py writes the folder, readback.py decodes the integers from the written files again.
"""

from roundexport.environment.openvino_import import import_openvino
from roundexport.targets.interface import Target

import_openvino()  # before any file of this folder imports it with its telemetry

from .export import export  # noqa: E402
from .fused_attention import fused_attention  # noqa: E402
from .lowering import check  # noqa: E402
from .readback import read_back  # noqa: E402
from .settings import OpenVinoSettings, refusal, speed_note  # noqa: E402
from .w8a8 import quantize  # noqa: E402

__all__ = ["TARGET", "OpenVinoSettings", "check", "export", "read_back", "refusal", "speed_note"]

TARGET = Target(
    OpenVinoSettings, refusal, check, export, read_back, speed_note, fused_attention, w8a8=quantize, spills=True
)
