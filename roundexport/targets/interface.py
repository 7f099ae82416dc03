"""The contract between a target (a folder of targets/) and the rest: what it offers, and what it says of an export.

A target's ``__init__.py`` defines ``TARGET = Target(...)``, generic in the class of its settings, so that mypy checks
it there.  Its ``products.py``, where there is one, defines ``PRODUCTS`` (schemes/kernel_timing.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from roundexport import plugins
from roundexport.errors import UsageError

if TYPE_CHECKING:
    from roundexport.formats.artifact import Artifact
    from roundexport.formats.package import PackageManifest
    from roundexport.graph.capture import Capture
    from roundexport.model.checkpoint import Checkpoint
    from roundexport.quant.quantized_linear import QuantizedLinear
    from roundexport.quant.spec import LinearInfo, QuantSpec

    from .attention_count import FusedAttention
    from .output_check import OutputCheck
    from .w8a8_control import Allowance
    from .w8a8_products import QuantizedProducts


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


class TargetSettings(Protocol):
    """Settings of any target: a frozen dataclass whose fields all have defaults."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def device(self) -> str:
        """What the package is meant for."""

    @property
    def max_context(self) -> int | None:
        """Longest sequence that the package serves; None: the model's own limit."""


T = TypeVar("T", bound=TargetSettings)
V = TypeVar("V")


@dataclass(frozen=True)
class Target(Generic[T]):
    """What a target can do.

    Args:
        settings: class of its settings.
        refusal: why it cannot hold a layer in a scheme, or None.
        check: lowers a captured model without its weights and raises what an export of it would; see check.py.
        export: fills an existing, empty folder; the caller makes the write atomic.
        read_back: integers of every quantized layer, decoded from a written package.
        speed_note: how a wide layer of a scheme runs with the default settings: ``fast``, or why not.
        fused_attention: attention layers that run as one operator, counted in a written graph.
        cross: of a model with an encoder and a decoder, keys and values of cross-attention travel from graph to graph;
            else the decoder's graph keeps them (graph/halves.py).
        joined: adds to a folder with both parts of a model that reads pictures the files by which other clients do;
            the manifests are those of the language model and of the image side.
        w8a8: quantizes a float package's graph in place by the target's own tool: folder, graph, samples and what may
            be lost; see w8a8.py.
        spills: while it exports, packed weights wait in a file beside the package, as large as that.
    """

    settings: type[T]
    refusal: Callable[[LinearInfo, QuantSpec], str | None]
    check: Callable[[Capture], None]
    export: Callable[[Artifact, Checkpoint, Path, T], ExportReport]
    read_back: Callable[[Path], dict[str, QuantizedLinear]]
    speed_note: Callable[[QuantSpec], str]
    fused_attention: Callable[[Path], FusedAttention]
    cross: bool = False
    joined: Callable[[Path, PackageManifest, PackageManifest], None] | None = None
    w8a8: Callable[[Path, str, Allowance], QuantizedProducts] | None = None
    spills: bool = False

    def known(self, given: Mapping[str, V]) -> dict[str, V]:
        """Those of the given values whose settings the target has."""
        return {field.name: given[field.name] for field in dataclasses.fields(self.settings) if field.name in given}

    def read_settings(self, name: str, given: Mapping[str, object]) -> T:
        """The target's settings with the given values; None leaves a default.

        Args:
            name: the target's, for the message.
            given: value by name of the setting.

        Raises:
            UsageError: a setting that the target does not have, or a value that makes no sense.
        """
        values = {key: value for key, value in given.items() if value is not None}
        known = {field.name for field in dataclasses.fields(self.settings)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise UsageError(f"target {name} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return self.settings(**values)


def load_target(name: str) -> Target[TargetSettings]:
    """The target of this name.

    Raises:
        UsageError: no such target; the text lists those that exist.
    """
    target: Target[TargetSettings] = plugins.load_value("targets", name, "TARGET", Target)
    return target
