"""Which importer reads a folder, and why none does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from roundexport import plugins
from roundexport.errors import CheckpointError, UnsupportedError

from .interface import ForeignLinear, Importer, QuantizedFolder

FLOAT_MODEL = "give the float model it was made from: roundexport tune"
_TOLD = {
    "bitsandbytes": "its 4-bit codes are places in a table (NF4, FP4), not steps of a grid, and its 8-bit form keeps "
                    "outliers apart",
    "hqq": "its zero points are fractions, which no runtime's integers hold",
    "fbgemm_fp8": "its weights are 8-bit floats, not integers",
    "modelopt": "its weights are low-bit floats (NVFP4, FP8), not integers",
    "aqlm": "its codes are places in learned tables",
    "quip": "its codes are places in a lattice",
    "vptq": "its codes are places in learned tables",
    "spqr": "it keeps outliers apart as sparse floats",
    "higgs": "its codes are places in a table, of rotated weights",
    "quark": "the order of the codes in its words depends on how it was exported (pack_method), which is not read",
    "eetq": "its 8-bit integers are arranged for one GPU kernel",
    "quanto": "its tensors are pickled objects",
    "torchao": "its tensors are pickled objects",
    "bitnet": "it was trained in three levels with its own activations",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Opened:
    """The quantized weights of a folder.

    Args:
        format: key of the importer.
        title: its name, for people.
        config: the quantization_config.
        layers: by the name under which a float file would have the weight, as in ``…q_proj.weight``.
        notes: what the format says that is not carried over.
    """

    format: str
    title: str
    config: Mapping[str, Any]
    layers: Mapping[str, ForeignLinear]
    notes: tuple[str, ...]


def open_quantized(folder: QuantizedFolder) -> Opened:
    """Find the importer of a folder and the layers it reads.

    Args:
        folder: a folder whose config.json has a quantization_config.

    Raises:
        UnsupportedError: no importer knows the format, or it holds what cannot be said exactly; with what to do.
        CheckpointError: tensors that contradict each other or the config.
    """
    config, where = folder.config, folder.location
    for name in plugins.names("importers"):
        importer: Importer = plugins.load_value("importers", name, "IMPORTER", Importer)
        if not importer.recognizes(config):
            continue
        layers = {f"{layer.name}.weight": layer for layer in importer.layers(folder)}
        twice = next(
            (weight for weight in layers if weight in folder.tensors and not _own(layers[weight], weight)), None
        )
        if twice:
            raise CheckpointError(f"{where}: the weights hold {twice} twice, as floats and as codes")
        return Opened(name, importer.title, config, layers, tuple(importer.notes(folder)))
    method = config.get("quant_method") or _older(config)
    if method in _TOLD:
        raise UnsupportedError(f"{where}: quantized by {method}, which is not imported: {_TOLD[method]}; {FLOAT_MODEL}")
    known = ", ".join(plugins.names("importers"))
    raise UnsupportedError(
        f"{where}: quantized by {method!r:.60} (quant_method in config.json), which is not known; {known} are read. "
        f"Otherwise {FLOAT_MODEL}"
    )


def _own(layer: ForeignLinear, weight: str) -> bool:
    """Whether the integers are stored under the weight's own name."""
    return weight in layer.tensors


def _older(config: Mapping[str, Any]) -> str | None:
    """The method of configs that do not name it."""
    return "bitsandbytes" if config.get("load_in_4bit") or config.get("load_in_8bit") else None
