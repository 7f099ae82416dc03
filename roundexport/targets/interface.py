"""What a target says about an export: every linear is either exported as integers or kept float with a reason."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .output_check import OutputCheck


@dataclass(frozen=True)
class ExportReport:
    """Outcome of one export.

    Args:
        target: ``onnx`` or ``openvino``.
        exported: artifact layers whose integers are in the graph, each exactly once.
        kept_float: (layer, reason) for every linear or embedding that stayed float.
        fusions: rule name -> how many times it was applied.
        refused: (rule, reason) for rewrites that found their pattern but could not be applied.
        files: written files relative to the package folder, with sizes in bytes.
        notes: sentences about the whole package that its user must read.
        outputs: how far the package's outputs are from the model's; None until that was compared.
    """

    target: str
    exported: tuple[str, ...]
    kept_float: tuple[tuple[str, str], ...] = ()
    fusions: dict[str, int] = field(default_factory=dict)
    refused: tuple[tuple[str, str], ...] = ()
    files: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    outputs: OutputCheck | None = None

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return asdict(self)
