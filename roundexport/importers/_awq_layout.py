"""AWQ's layouts, of AutoAWQ, auto-round (`auto_awq`) and GPTQModel.

    gemm  qweight [K, N·b/32] I32  along N, in runs of eight out of order (word_packing.py)
          qzeros  [G, N·b/32] I32  likewise               scales [G, N] F16
    gemv  qweight [N, K/8]    I32  along K, in order
          qzeros  [N, W]      I32  along G, filled up     scales [N, 8·W] F16, filled up

Zero points are stored as they are.  gemv fills W up to what its kernel wants, with zeros behind the last group.
Source: WQLinear_GEMM and WQLinear_GEMV of AutoAWQ 0.2.9, export_to_awq of auto-round 0.16.
"""

from __future__ import annotations

from roundexport.errors import CheckpointError, UnsupportedError
from roundexport.quant.packing import pack_codes
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import BITS
from roundexport.quant.word_packing import WORD_BITS, awq_ordered, stream_of_rows, unpack_stream

from ._gptq_layout import Scheme, assembled
from .interface import ForeignLinear, QuantizedFolder, group_size_for

_BITS = (4, 5, 6, 7)
_RUN = 8  # columns whose order gemm changes
_PARTS = ("qweight", "qzeros", "scales")


def gemm_layer(folder: QuantizedFolder, module: str, scheme: Scheme) -> ForeignLinear:
    """A layer of the gemm layout, its shapes held against each other.

    Raises:
        CheckpointError: shapes that contradict each other or the scheme.
        UnsupportedError: bits or groups that are not read.
    """
    tensors, bits, where = folder.tensors, scheme.bits, f"{folder.location}: {module}"
    _check_bits(bits, where)
    width, words = tensors.matrix_shape(f"{module}.qweight")
    rows, rest = divmod(words * WORD_BITS, bits)
    if rest or rows % _RUN:
        raise CheckpointError(f"{where}.qweight is {[width, words]}, which no whole runs of {bits}-bit codes fill")
    groups = _groups(scheme, width, where)
    tensors.check(f"{module}.qweight", ("I32",), (width, words))
    tensors.check(f"{module}.qzeros", ("I32",), (groups, words))
    tensors.check(f"{module}.scales", ("F16", "BF16", "F32"), (groups, rows))

    def read() -> QuantizedLinear:
        scales = tensors.scales(f"{module}.scales", (groups, rows))
        codes, zero = (
            awq_ordered(unpack_stream(stream_of_rows(tensors.read(f"{module}.{part}")), bits, rows))
            for part in ("qweight", "qzeros")
        )
        packed = pack_codes(codes.T, bits if bits in BITS else 8)
        return assembled(packed, scales.T, zero.T, scheme, width, where)

    return ForeignLinear(module, rows, width, tuple(f"{module}.{part}" for part in _PARTS), read)


def gemv_layer(folder: QuantizedFolder, module: str, scheme: Scheme) -> ForeignLinear:
    """A layer of the gemv layout, its shapes held against each other.

    Raises:
        CheckpointError: shapes that contradict each other or the scheme.
        UnsupportedError: bits or groups that are not read.
    """
    tensors, bits, where = folder.tensors, scheme.bits, f"{folder.location}: {module}"
    if bits != 4:
        raise UnsupportedError(f"{where}: AWQ's gemv layout has 4 bits, quantization_config says {bits}")
    rows, words = tensors.matrix_shape(f"{module}.qweight")
    width = words * WORD_BITS // bits
    groups = _groups(scheme, width, where)
    _, held = tensors.matrix_shape(f"{module}.qzeros")
    if held * WORD_BITS // bits < groups:
        raise CheckpointError(f"{where}.qzeros has no place for the zero points of {groups} groups")
    tensors.check(f"{module}.qweight", ("I32",), (rows, words))
    tensors.check(f"{module}.qzeros", ("I32",), (rows, held))
    padded = (rows, held * WORD_BITS // bits)
    tensors.check(f"{module}.scales", ("F16", "BF16", "F32"), padded)

    def read() -> QuantizedLinear:
        scales = tensors.scales(f"{module}.scales", padded)[:, :groups]
        zero = unpack_stream(stream_of_rows(tensors.read(f"{module}.qzeros")), bits, groups)
        return assembled(stream_of_rows(tensors.read(f"{module}.qweight")), scales, zero, scheme, width, where)

    return ForeignLinear(module, rows, width, tuple(f"{module}.{part}" for part in _PARTS), read)


def _check_bits(bits: int, where: str) -> None:
    if bits not in _BITS:
        raise UnsupportedError(f"{where}: AWQ's gemm layout has 4 to 7 bits, quantization_config says {bits}")


def _groups(scheme: Scheme, width: int, where: str) -> int:
    group, _ = group_size_for(scheme.group_size, width, where)
    return 1 if group is None else width // scheme.group_size
