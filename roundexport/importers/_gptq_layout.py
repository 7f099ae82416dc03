"""The layout that GPTQ, auto-round and GPTQModel share: qweight, qzeros, scales and, sometimes, g_idx.

    qweight [K·b/32, N] I32   codes along K, see word_packing.py            scales [G, N] F16 | BF16 | F32
    qzeros  [G, N·b/32] I32   zero points along N, one too low in v1        g_idx  [K]    I32, group of every input

Groups of act-order (`desc_act`) are scattered over the inputs unless they are static.  Where g_idx is the same inside
every run of group_size inputs its groups are runs, in whatever order, and the scales are put into theirs; any other
g_idx is refused: no runtime multiplies it fast, and ONNX Runtime's own g_idx is wrong at packed zero points.
Codes of 5, 6 and 7 bits are stored in 8, with the same zero points, or shifted to the middle where they are symmetric.

v1 at a zero point of 0 has nothing to store: packers subtract 1 from whole words, which borrows from the neighbors.
GPTQModel's loader adds the 1 to whole words, which gives it back; so is it here.
Source: convert_gptq_v1_to_v2_format of GPTQModel 7.6, QuantLinear of auto-round 0.16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import CheckpointError, SpecError, UnsupportedError
from roundexport.quant.packing import pack_codes
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import BITS, QuantSpec
from roundexport.quant.word_packing import WORD_BITS, stream_of_columns, stream_of_rows, unpack_stream

from ._zero_points import Reading, check_convention, gather
from .interface import ForeignLinear, QuantizedFolder, group_size_for

KNOWN_BITS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Scheme:
    """What a config says of one layer.

    Args:
        bits: of a code.
        group_size: inputs per scale; -1: all.
        symmetric: the zero point is 2^(bits-1) everywhere.
        zero_shift: to be added to stored zero points, see _zero_points.py.
    """

    bits: int
    group_size: int
    symmetric: bool
    zero_shift: int


def checked_scheme(bits: object, group_size: object, symmetric: object, zero_shift: int, where: str) -> Scheme:
    """A scheme from values of a config.

    Raises:
        CheckpointError: a value of another type.
        UnsupportedError: bits that are not read.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in KNOWN_BITS:
        raise UnsupportedError(f"{where}: bits {bits!r} are not read; {', '.join(map(str, KNOWN_BITS))} are")
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < -1:
        raise CheckpointError(f"{where}: group_size must be a whole number, or -1 for whole rows, not {group_size!r}")
    if not isinstance(symmetric, bool):
        raise CheckpointError(f"{where}: sym must be true or false, not {symmetric!r}")
    return Scheme(bits, group_size, symmetric, zero_shift)


def checked_layers(folder: QuantizedFolder, schemes: Mapping[str, Scheme], explicit: bool) -> Sequence[ForeignLinear]:
    """The layers of GPTQ's layout, with their zero points' convention held against the numbers.

    Args:
        folder: the checkpoint.
        schemes: of every layer that has packed codes.
        explicit: the config names the convention of zero points.

    Raises:
        CheckpointError: none is packed, shapes contradict the scheme, or the convention is another one.
        UnsupportedError: what cannot be held exactly.
    """
    if not schemes:
        raise CheckpointError(f"{folder.location}: quantization_config says quantized, but no layer has a qweight")
    found = [layer(folder, module, scheme) for module, scheme in schemes.items()]
    for symmetric in (True, False):
        alike = [one for one in found if schemes[one.name].symmetric == symmetric]
        if alike:
            evidence = gather([_reading(folder, one, schemes[one.name]) for one in alike])
            check_convention(evidence, symmetric, schemes[alike[0].name].zero_shift, explicit, folder.location)
    return found


def _reading(folder: QuantizedFolder, found: ForeignLinear, scheme: Scheme) -> Reading:
    """A layer's zero points; its codes when they are asked for.

    Raises:
        CheckpointError: a group that is not there.
        UnsupportedError: groups that are not runs, which so is known before anything large is read.
    """
    tensors, name = folder.tensors, found.name
    zero = _zero_points(tensors.read(f"{name}.qzeros"), scheme, found.out_features)
    if f"{name}.g_idx" in tensors:
        group_order(tensors.read(f"{name}.g_idx"), len(zero), f"{folder.location}: {name}")

    def mean_code() -> float:
        stream = stream_of_columns(tensors.read(f"{name}.qweight"))
        return float(unpack_stream(stream, scheme.bits, found.in_features).mean(dtype=np.float64))

    return Reading(scheme.bits, zero, mean_code)


def layer(folder: QuantizedFolder, module: str, scheme: Scheme) -> ForeignLinear:
    """A layer of this layout, its shapes held against each other.

    Args:
        folder: the checkpoint.
        module: path of the layer.
        scheme: what the config says of it.

    Raises:
        CheckpointError: shapes that contradict each other or the scheme.
        UnsupportedError: groups that cannot be held exactly.
    """
    tensors, bits = folder.tensors, scheme.bits
    words, rows = tensors.matrix_shape(f"{module}.qweight")
    width, rest = divmod(words * WORD_BITS, bits)
    if rest:
        raise CheckpointError(
            f"{folder.location}: {module}.qweight has {words} words along its inputs, which no whole number of "
            f"codes of {bits} bits fills; quantization_config says {bits} bits"
        )
    group, _ = group_size_for(scheme.group_size, width, f"{folder.location}: {module}")
    groups = 1 if group is None else width // scheme.group_size
    if rows * bits % WORD_BITS:
        raise CheckpointError(f"{folder.location}: {module} has {rows} outputs, whose zero points fill no whole words")
    tensors.check(f"{module}.qweight", ("I32",), (words, rows))
    tensors.check(f"{module}.qzeros", ("I32",), (groups, rows * bits // WORD_BITS))
    tensors.check(f"{module}.scales", ("F16", "BF16", "F32"), (groups, rows))
    parts = [f"{module}.{part}" for part in ("qweight", "qzeros", "scales")]
    if f"{module}.g_idx" in tensors:
        tensors.check(f"{module}.g_idx", ("I32", "I64"), (width,))
        parts.append(f"{module}.g_idx")
    return ForeignLinear(module, rows, width, tuple(parts), lambda: _read(folder, module, scheme, width))


def _read(folder: QuantizedFolder, module: str, scheme: Scheme, width: int) -> QuantizedLinear:
    tensors, bits, where = folder.tensors, scheme.bits, f"{folder.location}: {module}"
    scales = tensors.scales(f"{module}.scales", tensors.shape(f"{module}.scales"))
    zero = _zero_points(tensors.read(f"{module}.qzeros"), scheme, scales.shape[1])
    if f"{module}.g_idx" in tensors:
        order = group_order(tensors.read(f"{module}.g_idx"), len(scales), where)
        scales, zero = scales[order], zero[order]
    stream = stream_of_columns(tensors.read(f"{module}.qweight"))
    packed = stream if bits in BITS else pack_codes(unpack_stream(stream, bits, width), 8)
    return assembled(packed, scales.T, zero.T, scheme, width, where)


def assembled(
    packed: NDArray[np.uint8], scales: NDArray[np.floating], zero: NDArray[np.uint8], scheme: Scheme, width: int,
    where: str,
) -> QuantizedLinear:  # fmt: skip
    """The canonical form of codes as they are.

    Args:
        packed: uint8 [N, …] bit stream per row; of 8 bits where the scheme's are 5, 6 or 7.
        scales: [N, G].
        zero: zero points [N, G].
        scheme: what the config says.
        width: K.
        where: the layer, for errors.

    Raises:
        CheckpointError: a zero point out of range, or one that is not the midpoint of a symmetric scheme.
        UnsupportedError: groups that cannot be held exactly.
    """
    bits, own = scheme.bits, scheme.bits if scheme.bits in BITS else 8
    if zero.size and int(zero.max()) >> bits:
        raise CheckpointError(
            f"{where}: a zero point is {int(zero.max())}, beyond the {bits} bits of the codes; is "
            "checkpoint_format right?"
        )
    middle = 1 << (bits - 1)
    if symmetric := bool((zero == middle).all()):
        if own != bits:
            packed = packed + np.uint8((1 << (own - 1)) - middle)
    elif scheme.symmetric:
        raise CheckpointError(
            f"{where}: quantization_config says sym, but zero points run from {int(zero.min())} to {int(zero.max())} "
            f"where {middle} is the middle; `sym` or checkpoint_format is wrong, or the file is damaged"
        )
    group, repeats = group_size_for(scheme.group_size, width, where)
    spread = np.ascontiguousarray(np.repeat(scales, repeats, axis=1))
    spec = QuantSpec(own, group, symmetric, "float16" if scales.dtype == np.float16 else "float32")
    stored = None if symmetric else np.ascontiguousarray(np.repeat(zero, repeats, axis=1).astype(np.uint8))
    try:
        return QuantizedLinear(spec, width, np.ascontiguousarray(packed[:, : spec.row_bytes(width)]), spread, stored)
    except SpecError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _zero_points(words: NDArray[np.int32], scheme: Scheme, rows: int) -> NDArray[np.uint8]:
    """Zero points [G, N]."""
    bits = scheme.bits
    if not scheme.zero_shift:
        return unpack_stream(stream_of_rows(words), bits, rows)
    if WORD_BITS % bits:  # GPTQModel takes these apart first
        return (unpack_stream(stream_of_rows(words), bits, rows) + np.uint8(1)) & np.uint8((1 << bits) - 1)
    pattern = np.int32(sum(1 << place for place in range(0, WORD_BITS, bits)))
    return unpack_stream(stream_of_rows(np.asarray(words) + pattern), bits, rows)


def group_order(g_idx: NDArray[np.integer], groups: int, where: str) -> NDArray[np.int64]:
    """The group of every run of inputs.

    Raises:
        CheckpointError: a group that is not there.
        UnsupportedError: groups that are not runs.
    """
    index = np.asarray(g_idx, np.int64)
    if index.min() < 0 or index.max() >= groups:
        raise CheckpointError(f"{where}: g_idx names group {int(index.max())} of {groups}")
    runs = index.reshape(groups, -1)
    if (runs != runs[:, :1]).any():
        raise UnsupportedError(
            f"{where}: its groups are scattered over the inputs (act-order: desc_act true without static groups), "
            "which neither ONNX Runtime nor OpenVINO multiplies; quantize again with desc_act false or static_groups "
            "true, or start from the float model: roundexport tune"
        )
    return runs[:, 0]
