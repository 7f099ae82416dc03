"""ONNX target: MatMulNBits, GatherBlockQuantized and GroupQueryAttention for ONNX Runtime on CPU.

    translate.py          torch.export program -> ONNX graph with placeholder nodes
    lowering.py           the order of the rules; one rule per file:
        tidy reshapes decoder_attention encoder_attention cross_attention states rope norms merge linears
        integer_linears
    kernel_forms.py weight_layout.py which form of a weight runs fast, and its bytes
    datafile.py           external data, one tensor in memory at a time
    w8a8.py               a float package's graph in 8 bits, by ONNX Runtime's own tool
    readback.py           integers decoded from the written files: the proof
    client.py speech_client.py vision_client.py    genai_config.json, and what else onnxruntime-genai reads
    export.py             all of it in one go, and the package manifest

`TARGET` is what the rest of roundexport uses.
"""

from __future__ import annotations

from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.targets.interface import Target

from .export import export, read_back
from .fused_attention import fused_attention
from .kernel_forms import slow, stored_form
from .lowering import check
from .settings import OnnxSettings
from .vision_client import write_vision_client
from .w8a8 import quantize

__all__ = ["TARGET", "OnnxSettings", "check", "export", "read_back", "refusal", "speed_note"]


def refusal(info: LinearInfo, spec: QuantSpec) -> str | None:
    """Why this target cannot hold a layer in this scheme, or None.

    Every scheme of the artifact has an exact form here (see kernel_forms.py); what remains is a limit of the file
    format: a weight's codes must fit the 2 GiB that ONNX Runtime takes for one tensor.
    """
    size = info.out_features * spec.row_bytes(info.in_features)
    if size >= 1 << 31:
        return f"its codes take {size >> 20} MiB; ONNX Runtime takes less than 2048 MiB for one tensor"
    return None


def speed_note(spec: QuantSpec) -> str:
    """How a wide layer of this scheme runs with the default settings: ``fast``, or why not."""
    return slow(spec, stored_form(spec, 4096), OnnxSettings().accuracy_level) or "fast"


TARGET = Target(
    OnnxSettings,
    refusal,
    check,
    export,
    read_back,
    speed_note,
    fused_attention,
    cross=True,
    joined=write_vision_client,
    w8a8=quantize,
)
