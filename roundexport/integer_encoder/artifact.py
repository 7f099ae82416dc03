"""An integer encoder as an artifact: its weights, its vectors in eight bits, and the formats of what its linears read.

    integers of linears and tables       layers of the artifact
    biases, norms                         its overrides, in eight bits
    formats of the linears' inputs        algorithm.settings.inputs (model/integer_inputs.py)

So targets ship the very integers of the reference, with products of eight-bit inputs (onnx/integer_linears.py,
openvino/integer_linear.py), and `FromArtifact` makes the reference of the artifact again, once calibrated on the same
samples.  Formats of what no linear reads (queries, sums before norms) are not recorded: runtimes keep those tensors as
floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from roundexport.environment.versions import library_versions
from roundexport.formats.artifact_writer import ArtifactWriter
from roundexport.kernels._block_format import Format
from roundexport.kernels.integer_encoder import IntegerEncoder
from roundexport.model.artifact_source import artifact_source
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.integer_inputs import to_json
from roundexport.quant.int8_tensor import Int8Tensor
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import LinearInfo
from roundexport.storage.atomic import write_folder

from .calibrate import IntegerSettings
from .float_encoder import EMBEDDING_NORM, LINEARS, TABLES, FloatEncoder

NAME = "bct_encoder"


def write_artifact(
    integers: IntegerEncoder,
    floats: FloatEncoder,
    checkpoint: Checkpoint,
    out: Path,
    settings: IntegerSettings,
    calibration: Mapping[str, Any],
) -> None:
    """Write an integer encoder as an artifact.

    Args:
        integers: the encoder.
        floats: the float one it was made from, which knows its tensors' names.
        checkpoint: the float model.
        out: folder to make.
        settings: how it was calibrated.
        calibration: identity of the samples.

    Raises:
        UsageError: ``out`` exists.
    """
    weights, vectors, inputs = _parts(integers, floats)
    tables = set(TABLES)
    infos = {
        name: LinearInfo(name, w.in_features, w.out_features, "embedding" if name in tables else "linear")
        for name, w in weights.items()
    }
    matrices = [n for n in checkpoint.names() if n.endswith(".weight") and len(checkpoint.shape(n)) > 1]
    left = [name.removesuffix(".weight") for name in matrices if name.removesuffix(".weight") not in infos]
    with write_folder(out) as folder:
        writer = ArtifactWriter(folder, [(infos[name], weight.spec) for name, weight in weights.items()])
        for name, weight in weights.items():
            writer.add(name, weight)
        for name, vector in vectors.items():
            writer.add_override(name, vector)
        writer.finish(
            source=artifact_source(checkpoint),
            algorithm={"name": NAME, "settings": {**asdict(settings), **to_json(inputs)}},
            calibration=dict(calibration),
            kept_float=[(name, "last_hidden_state does not depend on it") for name in left],
            versions=library_versions(),
            side_files=checkpoint.copy_side_files(folder),
        )


def _parts(
    integers: IntegerEncoder, floats: FloatEncoder
) -> tuple[dict[str, QuantizedLinear], dict[str, Int8Tensor], dict[str, Format]]:
    """Weights, vectors and the linears' input formats, by name."""
    weights = {name: table.weight for name, table in zip(TABLES, integers.embeddings, strict=True)}
    vectors: dict[str, Int8Tensor] = {}
    inputs: dict[str, Format] = {}
    norms = {EMBEDDING_NORM: integers.norm}
    for index, block in enumerate(integers.blocks):
        for tensor in LINEARS:
            linear, name = getattr(block, tensor), floats.linear(index, tensor)
            weights[name], vectors[f"{name}.bias"], inputs[name] = linear.weight, linear.bias, linear.entering
        norms[floats.norm_name(index, "middle")] = block.middle_norm
        norms[floats.norm_name(index, "last")] = block.last_norm
    for name, norm in norms.items():
        vectors |= {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
    return weights, vectors, inputs
