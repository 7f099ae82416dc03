"""What can be set for an OpenVINO package, and which layers the target refuses."""

from __future__ import annotations

from dataclasses import dataclass

from roundexport.errors import UsageError
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.targets.spared import check_time

DEVICES = ("cpu", "gpu")


@dataclass(frozen=True)
class OpenVinoSettings:
    """What can be set for one export.

    Args:
        device: what the package is meant for, ``cpu`` or ``gpu``.  GPU plugins have no 2-bit type: 2-bit codes are then
            stored in four bits, exactly (constants.py).  A package for the GPU also runs on the CPU.
        max_context: longest sequence recorded in the manifest; None: see graph/rotary_length.py.  The graph is dynamic.
        pooled: of an embedder, let vectors come out of the graph, not hidden states.
        inputs_embeds: of a decoder, let its graph read vectors, and its table of tokens be a graph of its own, so that
            pictures can stand among the tokens.
        activation_time: how much longer a token's products may take, as a share, for layers that keep float activations
            where all others' are rounded to 8 bits; which ones, the artifact's record says (targets/spared.py), and
            without a record none.  For the CPU only.  None: 0.03, where there is a record.

    Raises:
        UsageError: an unknown device, a max_context below 1, an activation_time that is no share, or with gpu.
    """

    device: str = "cpu"
    max_context: int | None = None
    pooled: bool = False
    inputs_embeds: bool = False
    activation_time: float | None = None

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise UsageError(f"device {self.device!r} is not an OpenVINO package's; use one of {', '.join(DEVICES)}")
        if self.max_context is not None and self.max_context < 1:
            raise UsageError(f"max_context {self.max_context} must be at least 1")
        check_time(self.activation_time, {f"device {self.device}": self.device != "cpu"})


def refusal(info: LinearInfo, _spec: QuantSpec) -> str | None:
    """Why a layer cannot be held compressed, or None when it can.

    Every scheme of the artifact has an exact form.  A matrix with a single row is the exception: plugins turn it to
    floats when they load the graph (OC = 1 in ConvertFullyConnectedToFullyConnectedCompressed).
    """
    if info.kind == "linear" and info.out_features == 1:
        return "a weight with one row is not kept compressed by OpenVINO; keep it float"
    return None


def speed_note(spec: QuantSpec) -> str:
    """How a layer of this scheme decodes on CPU, as measured with openvino 2026.4.1 on AVX2 (K=2048, N=6144)."""
    if spec.bits == 3:
        return "3-bit codes are stored in 4 bits, as there is no fast 3-bit kernel"
    if spec.bits == 2:
        return "smaller, not faster: decodes like 4 bits asymmetric"
    if not spec.symmetric:
        return "1.25 to 1.5 times slower at one token than symmetric"
    return "fast"
