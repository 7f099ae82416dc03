"""An artifact and its float model, as formats of others see them: quantized weights with their facts, and floats.

Names are those of the transformers model, whatever the source's files call them.  A weight that several modules share
is there once, under the name of its owner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import UnsupportedError
from roundexport.formats.artifact import Artifact
from roundexport.model.checkpoint import Checkpoint
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

HEAD = "lm_head"
_FLOATS = ("F16", "BF16", "F32", "F64")
_TOP_HALF = np.uint32(0xFFFF0000)

FloatDtype = Literal["F16", "BF16", "F32"]


@dataclass(frozen=True)
class Facts:
    """What a format must know of a quantized weight before it is written.

    Args:
        name: module path.
        rows: N.
        width: K.
        spec: its scheme.
        table: an embedding, whose weight lm_head may share.
        scales: the narrowest dtype that holds every scale exactly.
    """

    name: str
    rows: int
    width: int
    spec: QuantSpec
    table: bool
    scales: FloatDtype

    @property
    def group(self) -> int:
        """Inputs per scale; -1: all of them, as other formats say it."""
        return self.spec.group_size or -1


class Outgoing:
    """What there is to write.

    Args:
        artifact: the integers, and the float tensors that tuning changed.
        checkpoint: the float model they came from.

    Attributes:
        facts: of every quantized weight, in the model's order.

    Raises:
        UnsupportedError: the model is a part of a larger one, of which no folder can be made.
    """

    def __init__(self, artifact: Artifact, checkpoint: Checkpoint) -> None:
        if checkpoint.part is not None:
            raise UnsupportedError(
                f"{checkpoint.location}: the artifact holds the {checkpoint.part} part of a larger model; folders of "
                "other formats hold whole models. Export it to onnx or openvino"
            )
        self.artifact, self.checkpoint = artifact, checkpoint
        self._overrides = artifact.overrides()
        self.facts = tuple(self._facts(name) for name in artifact.names())

    def linear(self, name: str) -> QuantizedLinear:
        """Integers of a quantized weight."""
        return self.artifact.linear(name)

    def shared(self, name: str) -> tuple[str, ...]:
        """Other modules that own a quantized weight."""
        return self.artifact.entry(name).info.shared_with

    def float_names(self) -> list[str]:
        """Float tensors of the model that are not a quantized module's weight, each once."""
        quantized = {f"{module}.weight" for facts in self.facts for module in (facts.name, *self.shared(facts.name))}
        return [
            name
            for name in self.checkpoint.owned()
            if name not in quantized and (name in self._overrides or self.checkpoint.dtype(name) in _FLOATS)
        ]

    def float_dtype(self, name: str) -> FloatDtype:
        """The dtype that holds a float tensor as it is: the source's, or float32 of what tuning changed."""
        if name in self._overrides:
            return "F32"
        dtype = self.checkpoint.dtype(name)
        return dtype if dtype in ("F16", "BF16") else "F32"  # type: ignore[return-value]

    def float32(self, name: str) -> NDArray[np.float32]:
        """A float tensor."""
        if name in self._overrides:
            return self._overrides[name].reshape(self.checkpoint.shape(name))
        return self.checkpoint.float32(name)

    def float_modules(self) -> tuple[str, ...]:
        """Modules with a float matrix, among them a lm_head that shares one."""
        model, quantized = self.checkpoint, {facts.name for facts in self.facts}
        matrices = (name for name in model.names() if name.endswith(".weight") and len(model.shape(name)) == 2)
        return tuple(module for name in matrices if (module := name.removesuffix(".weight")) not in quantized)

    def kept_float(self) -> tuple[tuple[str, str], ...]:
        """(module, reason) of every linear or embedding that the artifact leaves float."""
        return self.artifact.manifest.kept_float

    def _facts(self, name: str) -> Facts:
        info = self.artifact.entry(name).info
        linear = self.artifact.linear(name)
        return Facts(
            name, info.out_features, info.in_features, linear.spec, info.kind == "embedding",
            narrowest(linear.scales.astype(np.float32)),
        )  # fmt: skip


def narrowest(values: NDArray[np.float32]) -> FloatDtype:
    """The narrowest of float16, bfloat16 and float32 that holds every value exactly."""
    with np.errstate(over="ignore"):
        if np.array_equal(values.astype(np.float16).astype(np.float32), values):
            return "F16"
    bits = np.ascontiguousarray(values).view(np.uint32)
    return "BF16" if np.array_equal(bits & _TOP_HALF, bits) else "F32"


def stored(values: NDArray[np.floating], dtype: FloatDtype) -> NDArray[np.generic]:
    """Values that a dtype holds exactly, as a safetensors file has them: bfloat16 as the upper halves of float32."""
    if dtype == "F16":
        return values.astype(np.float16)
    whole = np.ascontiguousarray(values, np.float32)
    return whole if dtype == "F32" else (whole.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
