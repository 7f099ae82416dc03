"""The proof: integers decoded from a written graph, by walking from each weight constant to what uses it.

Nothing here knows how the constants were written; the manifest says bits, groups and whether scales are powers of two.
Values are read by the meaning that OpenVINO gives the element types (two's complement for i4 and i8, element 0 in the
lowest bits; a zero point may be a float), zero points and scales are those that the graph subtracts and multiplies by:

    artifact code  =  value                    unsigned types
                      value + 2^(bits-1)       signed types, which have no zero point in the graph

A layer that does not have exactly this chain is refused: Constant → Convert → [Subtract] → Multiply → [Reshape] →
[Convert] → MatMul and Gather nodes; with eight-bit inputs (integer_linear.py) Constant → Convert → Multiply → Reshape →
Convert → Multiply → MatMul.  A constant may hold the rows of several layers, one layer below the other
(siblings.py): its name lists them, and the lengths of the VariadicSplit behind its MatMul say how many rows each has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from roundexport.errors import ArtifactError
from roundexport.formats.package import PackageLayer, read_package
from roundexport.quant.packing import pack_codes
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec, ScaleDtype
from roundexport.types import EMBEDS, PAIRS

from .constants import INTEGER_INPUTS, JOINED, POWERS

MODEL_FILE = "openvino_model.xml"
ENCODER_FILE, DECODER_FILE = "openvino_encoder_model.xml", "openvino_decoder_model.xml"
"""What a model of two halves is written to, by the names that optimum-intel and openvino_genai read."""
ROWS_FILE, LANGUAGE_FILE = "openvino_text_embeddings_model.xml", "openvino_language_model.xml"
"""What a decoder that is cut behind its table of tokens is written to, by the same clients' names."""
VISION_FILE = "openvino_vision_embeddings_model.xml"
"""What the image side of a vision-language model is written to, likewise."""
MERGER_FILE, POSITIONS_FILE = "openvino_vision_embeddings_merger_model.xml", "openvino_vision_embeddings_pos_model.xml"
"""What blocks and positions are written to where that is cut (graph/grid_stages.py); patches are in `VISION_FILE`."""
_BITS = {"u2": 2, "u4": 4, "i4": 4, "u8": 8, "i8": 8}
COMPRESSED = ("Convert", "Subtract", "Multiply", "Reshape", "Convert")
WITH_INTEGERS = ("Convert", "Multiply", "Reshape", "Convert", "Multiply")
"""Nodes behind a weight constant; the first multiplication of the second adds the exponents of the inputs."""
STEPS = "first Multiply"
SPLIT = "VariadicSplit"
_SLICE = 1 << 22  # values unpacked at a time


@dataclass(frozen=True)
class Found:
    """One layer as the graph has it.

    Args:
        linear: the integers, in the artifact's form.
        users: type of node -> how many read the weight.
    """

    linear: QuantizedLinear
    users: Counter[str]


def read_back(folder: str | Path) -> dict[str, QuantizedLinear]:
    """Decode every quantized layer of a package from its graph.

    Args:
        folder: a package of this target; its manifest says bits and group size, everything else comes from the graph.

    Raises:
        ArtifactError: no valid package, or the graph does not hold a layer in the expected form exactly once.
    """
    manifest = read_package(folder, check_hashes=False)
    cut = bool(manifest.settings.get(EMBEDS))
    if manifest.task not in PAIRS and not cut:
        path = Path(folder) / manifest.model_file
        return {name: found.linear for name, found in found_layers(path, manifest.layers)}
    linears: dict[str, QuantizedLinear] = {}
    for path in (Path(folder) / (ROWS_FILE if cut else ENCODER_FILE), Path(folder) / manifest.model_file):
        there = weights_in(path)
        own = {name: layer for name, layer in manifest.layers.items() if name in there}
        linears.update((name, found.linear) for name, found in found_layers(path, own))
    if lost := sorted(set(manifest.layers) - set(linears)):
        raise ArtifactError(f"{folder}: {lost[0]} is in neither graph")
    return linears


def found_layers(path: Path, layers: Mapping[str, PackageLayer]) -> Iterator[tuple[str, Found]]:
    """Decode layers one at a time, in the order given.

    Args:
        path: the graph.
        layers: what to look for.

    Raises:
        ArtifactError: a layer is not in the graph exactly once, or not in the expected form.
    """
    model = _read(path)  # whose nodes live as long as it does
    weights = _weights(model)
    for name, layer in layers.items():
        constants = weights.get(name, [])
        if len(constants) != 1:
            raise ArtifactError(f"{path}: {name} has {len(constants)} weight constants, not one")
        try:
            yield name, _decode(constants[0], name, layer)
        except (ValueError, ArtifactError) as error:
            raise ArtifactError(f"{path}: {name}: {error}") from error


def weights_in(path: Path) -> set[str]:
    """Modules whose weight a graph holds.

    Raises:
        ArtifactError: OpenVINO cannot read it.
    """
    return set(_weights(_read(path)))


def _read(path: Path) -> ov.Model:
    try:
        return ov.Core().read_model(path)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{path}: OpenVINO cannot read it: {reason:.200}") from error


def _weights(model: ov.Model) -> dict[str, list[Any]]:
    """The constants that hold a module's weight, by the module's name."""
    found: dict[str, list[Any]] = {}
    for node in model.get_ops():
        name = node.get_friendly_name()
        if node.get_type_name() == "Constant" and name.endswith(".weight"):
            for module in name.removesuffix(".weight").split(JOINED):
                found.setdefault(module, []).append(node)
    return found


def _decode(constant: Any, name: str, layer: PackageLayer) -> Found:
    stored = constant.get_element_type().get_type_name()
    written, _, powers = layer["stored"].removesuffix(INTEGER_INPUTS).partition(" ")
    if stored != written or powers not in ("", POWERS):
        raise ArtifactError(f"stored as {stored}, the manifest says {layer['stored']}")
    chain = _chain(constant, WITH_INTEGERS if layer["stored"].endswith(INTEGER_INPUTS) else COMPRESSED)
    rows = _rows(constant, name, chain["end"])
    scales = np.array(chain["Multiply"].data).reshape(constant.get_output_shape(0)[0], -1)
    scale_dtype: ScaleDtype = "float16" if scales.dtype == np.float16 else "float32"
    if powers:
        scale_dtype, scales = "exponent8", scales.astype(np.float32)
    if STEPS in chain:
        scales = scales * np.float32(_values(_raw(chain[STEPS]), "i8").min())
    spec = QuantSpec(layer["bits"], layer["group_size"], layer["symmetric"], scale_dtype)
    midpoint = spec.midpoint if stored.startswith("i") else 0
    zero = chain.get("Subtract")
    zero_points = np.full(scales.shape, midpoint, np.int16)
    if zero is not None:
        zero_points = _zero_points(zero, scales.shape) + np.int16(midpoint)
    if spec.symmetric and (zero_points != spec.midpoint).any():
        raise ArtifactError(f"a zero point differs from {spec.midpoint}, which symmetric means")
    codes, width = _codes(constant, rows, spec, midpoint)
    kept = None if spec.symmetric else zero_points[rows].astype(np.uint8)
    return Found(QuantizedLinear(spec, width, codes, scales[rows], kept), chain["users"])


def _zero_points(constant: Any, shape: tuple[int, ...]) -> NDArray[np.int16]:
    """Zero points [N, G]: integers, or floats of whole numbers, also one for all (float_products.py)."""
    if constant.get_element_type() not in (ov.Type.f16, ov.Type.f32):
        return _values(_raw(constant), _kind(constant))[: shape[0] * shape[1]].reshape(shape)
    floats = np.array(constant.data)
    if floats.size not in (1, shape[0] * shape[1]) or (floats != np.clip(np.round(floats), 0, 255)).any():
        raise ArtifactError(f"zero points are floats {list(floats.shape)} that are not codes of {list(shape)} groups")
    return np.broadcast_to(floats.reshape(shape if floats.size > 1 else (1, 1)), shape).astype(np.int16)


def _rows(constant: Any, name: str, end: Any) -> slice:
    """The rows of a constant that are a module's: all, or what the split behind the product gives it."""
    modules = constant.get_friendly_name().removesuffix(".weight").split(JOINED)
    if len(modules) == 1:
        return slice(None)
    behind = [end]  # MatMul, where there is a bias Add, then the split
    for kinds in (("MatMul",), ("Add", SPLIT), (SPLIT,)):
        if behind[-1].get_type_name() == SPLIT:
            break
        users = [user.get_node() for port in behind[-1].outputs() for user in port.get_target_inputs()]
        users = [user for user in users if user.get_type_name() != "ShapeOf"]
        if len(users) != 1 or users[0].get_type_name() not in kinds:
            raise ArtifactError(f"rows of {len(modules)} layers, but behind them {[u.get_type_name() for u in users]}")
        behind.append(users[0])
    axis, lengths = (np.array(behind[-1].input_value(port).get_node().data).reshape(-1) for port in (1, 2))
    width = len(behind[-2].get_output_partial_shape(0))
    if (
        len(lengths) != len(modules)
        or lengths.sum() != constant.get_output_shape(0)[0]
        or axis[0] not in (-1, width - 1)
    ):
        raise ArtifactError(f"rows of {len(modules)} layers, cut into {lengths.tolist()} along axis {axis.tolist()}")
    at = modules.index(name)
    return slice(int(lengths[:at].sum()), int(lengths[: at + 1].sum()))


def _codes(constant: Any, part: slice, spec: QuantSpec, midpoint: int) -> tuple[NDArray[np.uint8], int]:
    """The artifact's packed codes [N, …] of some rows, and K; not all at once, an embedding is large when unpacked."""
    shape = constant.get_output_shape(0)
    width, kind = int(np.prod(shape[1:])), _kind(constant)
    if width * _BITS[kind] % 8:
        raise ArtifactError(f"rows of {width} {kind} values do not fill whole bytes")
    raw = _raw(constant).reshape(shape[0], -1)[part]
    rows = len(raw)
    packed = np.empty((rows, spec.row_bytes(width)), np.uint8)
    step = max(1, _SLICE // width)
    for start in range(0, rows, step):
        values = _values(raw[start : start + step].reshape(-1), kind) + np.int16(midpoint)
        if values.min() < 0 or values.max() > spec.max_code:
            raise ArtifactError(f"codes {values.min()} … {values.max()} do not fit in {spec.bits} bits")
        packed[start : start + step] = pack_codes(values.astype(np.uint8).reshape(-1, width), spec.bits)
    return packed, width


def _chain(constant: Any, kinds_in_order: Sequence[str]) -> dict[str, Any]:
    """Constants that the chain subtracts and, at last, multiplies by, its last node, and a tally of what reads it."""
    found: dict[str, Any] = {}
    node = constant
    for expected in kinds_in_order:
        users = [user.get_node() for user in node.output(0).get_target_inputs()]
        kinds = {user.get_type_name() for user in users}
        if kinds != {expected}:
            if expected in ("Convert", "Multiply") and "Multiply" not in found:
                raise ArtifactError(f"expected {expected} after {node.get_type_name()}, found {sorted(kinds)}")
            continue
        if len(users) != 1:
            raise ArtifactError(f"{len(users)} nodes of type {expected} follow {node.get_type_name()}, not one")
        if expected in ("Subtract", "Multiply"):
            if expected in found:
                found[STEPS] = found[expected]
            found[expected] = _constant_behind(users[0].input_value(1).get_node())
        node = users[0]
    found["users"] = Counter(user.get_node().get_type_name() for user in node.output(0).get_target_inputs())
    found["users"].pop("ShapeOf", None)  # reads no value
    found["end"] = node
    if set(found["users"]) - {"MatMul", "Gather"}:
        raise ArtifactError(f"the weight is read by {sorted(found['users'])}; only MatMul and Gather may")
    return found


def _constant_behind(node: Any) -> Any:
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        raise ArtifactError(f"expected a constant, found {node.get_type_name()}")
    return node


def _kind(constant: Any) -> str:
    kind = str(constant.get_element_type().get_type_name())
    if kind not in _BITS:
        raise ArtifactError(f"integers of type {kind} are not expected")
    return kind


def _raw(constant: Any) -> NDArray[np.uint8]:
    """The bytes of a constant, flat, without a copy."""
    return np.asarray(constant.data).reshape(-1).view(np.uint8)


def _values(raw: NDArray[np.uint8], kind: str) -> NDArray[np.int16]:
    """The elements in these bytes, by the meaning of their type."""
    bits = _BITS[kind]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    fields = (raw[:, None] >> shifts) & np.uint8((1 << bits) - 1)
    values = fields.reshape(-1).astype(np.int16)
    if kind.startswith("i"):
        values -= (values >> (bits - 1)) << bits  # two's complement
    return values
