"""What can be set for an ONNX package, and the versions that a written graph declares."""

from __future__ import annotations

from dataclasses import dataclass

from roundexport.errors import UsageError
from roundexport.targets.spared import check_time

# ONNX 21 has every operator used here and ONNX Runtime reads it since 1.17; com.microsoft has only ever had version 1.
OPSET = 21
IR_VERSION = 10
MODEL_FILE = "model.onnx"
DATA_ENDING = ".data"
ENCODER_FILE, DECODER_FILE = "encoder_model.onnx", "decoder_with_past_model.onnx"
"""What a model of two halves is written to, by the names that optimum reads; the runtime knows the first."""
FIRST_FILE = "decoder_model.onnx"
"""What such a decoder's first step is written to for optimum: first_step.py."""
ROWS_FILE = "embed_tokens.onnx"
"""What a decoder's table of tokens is written to where it is cut off, by the name that optimum reads."""
VISION_FILE = "vision_encoder.onnx"
"""What the image side of a vision-language model is written to, likewise."""
INTEGER_INPUTS = 4
ACCURACY_LEVELS = (0, 1, INTEGER_INPUTS)
ONNXRUNTIME, STANDARD = "onnxruntime", "standard"
DIALECTS = (ONNXRUNTIME, STANDARD)


@dataclass(frozen=True)
class OnnxSettings:
    """How an ONNX package is made.

    Args:
        accuracy_level: least precision of activations inside MatMulNBits: 4 rounds them to int8 per block (fast),
            0 or 1 keeps float32 (exact, several times slower; see kernel_forms.py).
        activation_time: how much longer a token's products may take, as a share, for layers that keep float32
            activations at accuracy_level 4; which ones, the artifact's record says (targets/spared.py), and without a
            record none do.  None: 0.03, where there is a record.
        max_context: longest sequence; None: see graph/rotary_length.py.  Sizes the rotary tables.
        device: only ``cpu``.
        pooled: of an embedder, let vectors come out of the graph, not hidden states.
        dialect: operators of the graph: ``onnxruntime``, its own fast ones, or ``standard``, those of ONNX alone, for
            other runtimes (standard/__init__.py).  A standard graph has no accuracy_level; the session that opens it
            has (``session.qdq_matmulnbits_accuracy_level``, 4 unless set).
        inputs_embeds: of a decoder, let its graph read vectors, and its table of tokens be a graph of its own, so that
            pictures can stand among the tokens.
        kernels: let products run by roundexport's own operator (kernels/native/), which the machine that opens the
            package must have built: faster, three bits in three, but a package for fewer clients.

    Raises:
        UsageError: a value outside these sets.
    """

    accuracy_level: int = 4
    activation_time: float | None = None
    max_context: int | None = None
    device: str = "cpu"
    pooled: bool = False
    dialect: str = ONNXRUNTIME
    inputs_embeds: bool = False
    kernels: bool = False

    def __post_init__(self) -> None:
        if self.accuracy_level not in ACCURACY_LEVELS:
            raise UsageError(f"accuracy_level {self.accuracy_level} is not supported; use 4 (int8) or 0 (float32)")
        if self.dialect not in DIALECTS:
            raise UsageError(f"dialect {self.dialect!r} is not known; use {' or '.join(DIALECTS)}")
        floats = {f"accuracy_level {self.accuracy_level}": self.accuracy_level != 4, "dialect standard": self.standard}
        check_time(self.activation_time, floats)
        if self.dialect == STANDARD and self.accuracy_level != 4:
            raise UsageError(
                f"accuracy_level {self.accuracy_level} goes with MatMulNBits, which dialect standard does not have; "
                "set session.qdq_matmulnbits_accuracy_level in the session that opens the graph"
            )
        if self.kernels and (self.dialect == STANDARD or self.accuracy_level != 4):
            raise UsageError("kernels go with dialect onnxruntime and accuracy_level 4 only")
        if self.max_context is not None and self.max_context < 1:
            raise UsageError(f"max_context must be at least 1, not {self.max_context}")
        if self.device != "cpu":
            raise UsageError(f"the onnx target is made for device cpu, not {self.device!r}; use openvino for others")

    @property
    def standard(self) -> bool:
        """Whether the graph has ONNX's own operators alone."""
        return self.dialect == STANDARD
