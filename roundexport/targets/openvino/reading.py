"""The proof: integers decoded from a written graph, by walking from each weight constant to what uses it.

Nothing here knows how the constants were written.  Values are read by the meaning that OpenVINO gives the element types
(two's complement for i4 and i8, element 0 in the lowest bits), zero points and scales are those that the graph
subtracts and multiplies by, and

    artifact code  =  value                    unsigned types
                      value + 2^(bits-1)       signed types, which have no zero point in the graph

A layer that does not have exactly this chain is refused: Constant → Convert → [Subtract] → Multiply → [Reshape] →
[Convert] → MatMul and Gather nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from roundexport.errors import ArtifactError
from roundexport.package import PackageLayer, read_package
from roundexport.quantized import QuantizedLinear
from roundexport.spec import QuantSpec, ScaleDtype

MODEL_FILE = "openvino_model.xml"
_BITS = {"u2": 2, "u4": 4, "i4": 4, "u8": 8, "i8": 8}


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
    """Decode every quantised layer of a package from its graph.

    Args:
        folder: a package of this target; its manifest says bits and group size, everything else comes from the graph.

    Raises:
        ArtifactError: no valid package, or the graph does not hold a layer in the expected form exactly once.
    """
    manifest = read_package(folder, check_hashes=False)
    return {name: found.linear for name, found in found_layers(Path(folder), manifest.layers)}


def found_layers(folder: Path, layers: Mapping[str, PackageLayer]) -> Iterator[tuple[str, Found]]:
    """Decode layers one at a time, in the order given.

    Raises:
        ArtifactError: a layer is not in the graph exactly once, or not in the expected form.
    """
    model = ov.Core().read_model(folder / MODEL_FILE)
    nodes: dict[str, list[Any]] = {}
    for node in model.get_ops():
        if node.get_type_name() == "Constant":
            nodes.setdefault(node.get_friendly_name(), []).append(node)
    for name, layer in layers.items():
        constants = nodes.get(f"{name}.weight", [])
        if len(constants) != 1:
            raise ArtifactError(f"{folder / MODEL_FILE}: {name} has {len(constants)} weight constants, not one")
        try:
            yield name, _decode(constants[0], layer)
        except (ValueError, ArtifactError) as error:
            raise ArtifactError(f"{folder / MODEL_FILE}: {name}: {error}") from error


def _decode(constant: Any, layer: PackageLayer) -> Found:
    stored = constant.get_element_type().get_type_name()
    if stored != layer["stored"]:
        raise ArtifactError(f"stored as {stored}, the manifest says {layer['stored']}")
    chain = _chain(constant)
    shape = constant.get_output_shape(0)
    rows, width = shape[0], int(np.prod(shape[1:]))
    scales = np.array(chain["Multiply"].data).reshape(rows, -1)
    scale_dtype: ScaleDtype = "float16" if scales.dtype == np.float16 else "float32"
    spec = QuantSpec(layer["bits"], layer["group_size"], layer["symmetric"], scale_dtype)
    zero = chain.get("Subtract")
    midpoint = spec.midpoint if stored.startswith("i") else 0
    codes = _values(constant).reshape(rows, width) + midpoint
    zero_points = np.full(scales.shape, midpoint) if zero is None else _values(zero).reshape(scales.shape) + midpoint
    if spec.symmetric and (zero_points != spec.midpoint).any():
        raise ArtifactError(f"a zero point differs from {spec.midpoint}, which symmetric means")
    if codes.min() < 0 or codes.max() > spec.max_code:
        raise ArtifactError(f"codes {codes.min()} … {codes.max()} do not fit in {spec.bits} bits")
    linear = QuantizedLinear.from_unpacked(
        spec, codes.astype(np.uint8), scales, None if spec.symmetric else zero_points.astype(np.uint8)
    )
    return Found(linear, chain["users"])


def _chain(constant: Any) -> dict[str, Any]:
    """Constants that the chain subtracts and multiplies by, and a tally of the nodes at its end."""
    found: dict[str, Any] = {}
    node = constant
    for expected in ("Convert", "Subtract", "Multiply", "Reshape", "Convert"):
        users = [user.get_node() for user in node.output(0).get_target_inputs()]
        kinds = {user.get_type_name() for user in users}
        if kinds != {expected}:
            if expected in ("Convert", "Multiply") and "Multiply" not in found:
                raise ArtifactError(f"expected {expected} after {node.get_type_name()}, found {sorted(kinds)}")
            continue
        if len(users) != 1:
            raise ArtifactError(f"{len(users)} nodes of type {expected} follow {node.get_type_name()}, not one")
        if expected in ("Subtract", "Multiply"):
            found[expected] = _constant_behind(users[0].input_value(1).get_node())
        node = users[0]
    found["users"] = Counter(user.get_node().get_type_name() for user in node.output(0).get_target_inputs())
    if set(found["users"]) - {"MatMul", "Gather"}:
        raise ArtifactError(f"the weight is read by {sorted(found['users'])}; only MatMul and Gather may")
    return found


def _constant_behind(node: Any) -> Any:
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        raise ArtifactError(f"expected a constant, found {node.get_type_name()}")
    return node


def _values(constant: Any) -> NDArray[np.int16]:
    """Elements of an integer constant, flat, by the meaning of its type."""
    kind = constant.get_element_type().get_type_name()
    if kind not in _BITS:
        raise ArtifactError(f"integers of type {kind} are not expected")
    bits = _BITS[kind]
    raw = np.array(constant.data).reshape(-1).view(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    fields = (raw[:, None] >> shifts) & np.uint8((1 << bits) - 1)
    values = fields.reshape(-1)[: int(np.prod(constant.get_output_shape(0)))].astype(np.int16)
    if kind.startswith("i"):
        values -= (values >> (bits - 1)) << bits  # two's complement
    return values
