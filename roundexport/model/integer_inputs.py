"""Formats of the eight-bit inputs that an artifact's linears are to read, as its manifest records them.

    algorithm.settings.inputs = {layer: [exponent of a block of neighboring channels, …]}

A channel's value is code · 2**exponent, codes have eight bits, and blocks are of equal width
(kernels/_block_format.py).  They are settled when the weights are, as weights are rounded for the integers that meet
them (integer_encoder/calibrate.py).  A target that computes products in integers rounds its inputs by them; elsewhere
they are ignored, and inputs stay float.

`INPUT_SPREAD`: exponents of one tensor differ by 3 at most.  A four-bit code times 2**3 is an integer from -64 to 64:
the difference of channels can stand in an eight-bit weight, and the sum of two products of eight-bit numbers stays
within 16 bits, where processors without VNNI saturate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from roundexport.errors import ArtifactError, UnsupportedError
from roundexport.kernels._block_format import Format

if TYPE_CHECKING:
    from roundexport.formats.artifact import Artifact
    from roundexport.quant.quantized_linear import QuantizedLinear

INPUT_SPREAD = 3
_KEY = "inputs"


def recorded(artifact: Artifact) -> dict[str, Format]:
    """The format of every linear's inputs, by layer; empty where the artifact records none.

    Raises:
        ArtifactError: what is recorded is not formats of its layers.
    """
    found: Any = artifact.manifest.algorithm["settings"].get(_KEY, {})
    if not isinstance(found, dict):
        raise ArtifactError(f"{artifact.path}: algorithm.settings.{_KEY} is not an object")
    return {name: _format(artifact, name, exponents) for name, exponents in found.items()}


def to_json(formats: Mapping[str, Format]) -> dict[str, Any]:
    """What a manifest records."""
    return {_KEY: {name: tensor.exponents.tolist() for name, tensor in formats.items()}}


def refuse_unfit(name: str, linear: QuantizedLinear, entering: Format) -> None:
    """Refuse a weight that does not become integers of eight bits for its inputs.

    Args:
        name: the layer's.
        linear: its integers.
        entering: the format of its inputs.

    Raises:
        UnsupportedError: other bits or scales, or exponents too far apart.
    """
    spec = linear.spec
    if (spec.bits, spec.symmetric, spec.scale_dtype) != (4, True, "exponent8") or linear.in_features % 2:
        raise UnsupportedError(
            f"{name}: the artifact gives it eight-bit inputs, which go with four symmetric bits on powers of two and "
            f"an even K, not with {spec.describe()}, K {linear.in_features}"
        )
    if linear.groups > 1:
        raise UnsupportedError(f"{name}: products of eight-bit integers take one scale a row, not {linear.groups}")
    steps = entering.channels() - int(entering.exponents.min())
    most = int((np.abs(linear.unpack().astype(np.int32) - spec.midpoint) << np.minimum(steps, 16)).max())
    if most > 127:
        raise UnsupportedError(
            f"{name}: its codes at the exponents of its inputs reach {most}, more than eight bits hold"
        )


def _format(artifact: Artifact, name: str, exponents: Any) -> Format:
    where = f"{artifact.path}: algorithm.settings.{_KEY} of {name}"
    width = artifact.entry(name).info.in_features
    good = isinstance(exponents, list) and all(type(one) is int and -64 <= one <= 63 for one in exponents)
    if not good or not exponents or width % len(exponents):
        raise ArtifactError(f"{where}: not a list of exponents from -64 to 63 that divides {width} channels")
    return Format(width, np.array(exponents, np.int8))
