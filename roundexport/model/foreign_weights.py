"""Weights that others have made smaller: integers on a grid, taken as they are, or short floats, tuned like others.

quantization_config says mxfp4, fp8     LowBitFloats: a float model in fewer bits, to be tuned like any other
anything else                           ImportedWeights: integers that an importer reads, or a refusal
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from roundexport.importers._tensors import Tensors
from roundexport.importers.interface import QuantizedFolder
from roundexport.storage.safetensors_reader import TensorFile

from .block_fp8 import fp8_weights
from .imported_weights import ImportedWeights
from .low_bit_floats import LowBitFloats
from .model_config import read_quantization_config
from .mxfp4 import mxfp4_weights

_FLOATS: dict[str, Callable[[QuantizedFolder], LowBitFloats]] = {"mxfp4": mxfp4_weights, "fp8": fp8_weights}


def foreign_weights(
    folder: Path, location: str, files: Mapping[str, TensorFile], stored: Mapping[str, str], model_type: str
) -> tuple[ImportedWeights | None, LowBitFloats | None]:
    """The integers of a folder, or its short floats; at most one of them is there.

    Args:
        folder: the model folder.
        location: as it was asked for.
        files: its weight files.
        stored: tensor -> file.
        model_type: of its config.

    Raises:
        UnsupportedError: a format that is not read; with what to do.
        CheckpointError: tensors that contradict each other or the config.
    """
    quantization = read_quantization_config(folder)
    if quantization is None:
        return None, None
    asked = QuantizedFolder(location, quantization, Tensors(files, stored))
    floats = _FLOATS.get(str(quantization.get("quant_method")))
    return (None, floats(asked)) if floats else (ImportedWeights(asked, model_type), None)
