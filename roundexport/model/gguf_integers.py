"""The integers of a GGUF file, where a scale and integers around zero are all there is to a block.

    Q4_0   32 weights   float16 d                               w = (q - 8) · d         4 bits
    Q5_0   32 weights   float16 d                               w = (q - 16) · d        5 bits, stored in 8
    Q8_0   32 weights   float16 d                               w = q · d               8 bits
    Q6_K   16 weights   int8 s of each, float16 d of 16 of them w = (q - 32) · (d · s)  6 bits, stored in 8

Only scales are taken out of the blocks.  The file's reader gives the weights (gguf_model.py), in the model's order of
rows, and a weight is a whole number of scales: that number is the integer.  Then code · scale must be the reader's
weight, bit for bit, or the layer is not imported; so an order of rows that is not known here cannot go unseen.  Known
are the file's own, and that of llama.cpp's rotary q and k (pairs of a head next to each other).

Q4_1, Q5_1 and the other K types have float minima, which no integer zero point holds: they stay float, by name.
Source: ggml-common.h of llama.cpp; gguf/quants.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

from .gguf_header import GgufHeader, GgufTensor

_HALF_SCALES = {"Q4_0": (4, 32, 18), "Q5_0": (8, 32, 22), "Q8_0": (8, 32, 34)}  # bits, weights and bytes of a block
_Q6_K_BYTES, _Q6_K_SCALES, _Q6_K_GROUP = 210, slice(192, 208), 16
_FLOATS = ("F32", "F16", "BF16", "F64")


class GgufIntegers:
    """Integers by the name of a weight in the transformers model.

    Args:
        header: the file's.
        config: config.json of the model that the reader makes of it.
    """

    def __init__(self, header: GgufHeader, config: dict[str, Any]) -> None:
        import gguf

        self._header, self._config = header, config
        self._tensors = {tensor.name: tensor for tensor in header.tensors}
        self._types = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
        known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        blocks = int(config.get("num_hidden_layers") or config.get("n_layer") or 0)
        self._names = gguf.get_tensor_name_map(known[header.architecture], blocks)

    def kind(self, name: str) -> str | None:
        """The type of a weight in the file, as in ``Q4_0``; None of a float one, or one that is not found."""
        tensor = self._tensor(name)
        kind = None if tensor is None else self._types[tensor.kind]
        return None if kind in _FLOATS else kind

    def linear(self, name: str, weight: NDArray[np.float32]) -> QuantizedLinear | None:
        """The integers of a weight.

        Args:
            name: parameter in the transformers model.
            weight: what the reader makes of it, [N, K].

        Returns:
            None where its type is not one of integers around zero, or its order of rows is not known.
        """
        tensor, kind = self._tensor(name), self.kind(name)
        if tensor is None or kind not in (*_HALF_SCALES, "Q6_K") or tensor.shape != weight.shape:
            return None
        spec, scales = self._scales(tensor, kind)
        for order in self._orders(len(weight)):
            codes = _codes(weight, scales[order].astype(np.float32), spec)
            if codes is not None:
                return QuantizedLinear.from_unpacked(spec, codes, np.ascontiguousarray(scales[order]))
        return None

    def _tensor(self, name: str) -> GgufTensor | None:
        stem = self._names.get_name(name, try_suffixes=(".weight",))
        return self._tensors.get(stem if stem is not None else "output.weight" if name == "lm_head.weight" else "")

    def _scales(self, tensor: GgufTensor, kind: str) -> tuple[QuantSpec, NDArray[np.floating]]:
        """Scheme, and scales [N, G] in the file's order."""
        rows, width = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        begin = self._header.data + tensor.offset
        if kind == "Q6_K":
            blocks = np.memmap(self._header.path, np.uint8, "r", begin, (rows, width // 256, _Q6_K_BYTES))
            whole = np.ascontiguousarray(blocks[..., -2:]).view("<f2").astype(np.float32)
            scales = whole * np.ascontiguousarray(blocks[..., _Q6_K_SCALES]).view(np.int8).astype(np.float32)
            return QuantSpec(8, _Q6_K_GROUP, True, "float32"), scales.reshape(rows, -1)
        bits, group, size = _HALF_SCALES[kind]
        blocks = np.memmap(self._header.path, np.uint8, "r", begin, (rows, width // group, size))
        return QuantSpec(bits, group), np.ascontiguousarray(blocks[..., :2]).view("<f2").reshape(rows, -1)

    def _orders(self, rows: int) -> Iterator[NDArray[np.intp]]:
        """Row of the file by row of the model."""
        own = np.arange(rows)
        yield own
        counts = {self._config.get("num_attention_heads"), self._config.get("num_key_value_heads")}
        for heads in sorted(count for count in counts if isinstance(count, int) and rows % (2 * count) == 0):
            yield own.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _codes(weight: NDArray[np.float32], scales: NDArray[np.float32], spec: QuantSpec) -> NDArray[np.uint8] | None:
    """Codes [N, K] that give exactly this weight; None where there are none."""
    groups = weight.reshape(*scales.shape, -1)
    steps = np.divide(groups, scales[..., None], out=np.zeros_like(groups), where=scales[..., None] != 0)
    whole = np.rint(steps)
    if not np.array_equal(whole * scales[..., None], groups):
        return None
    if whole.min() < -spec.midpoint or whole.max() >= spec.midpoint:
        return None
    return (whole.astype(np.int16) + spec.midpoint).astype(np.uint8).reshape(weight.shape)
