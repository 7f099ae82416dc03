"""Olive: what its own passes (`gptq`, `rtn`, …) write of a Hugging Face model, of 2, 4 and 8 bits.

    quant_method olive     bits, symmetric, group_size (-1: whole rows); overrides: layer -> those of its own
    qweight [N, ⌈K·b/8⌉] U8 along K, from the lowest bits; scales [N, G] F16 | BF16 | F32
    qzeros  [N, ⌈G·b/8⌉] U8 along G, where not symmetric

which is how weights lie here, too.  Embeddings are stored the same way.  Refused: older files that pack 32-bit words,
one scale for a whole tensor (group_size 0).
Source: olive/common/quant/nn.py and hf_utils.py of Olive 0.13.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from roundexport.errors import CheckpointError, UnsupportedError
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.word_packing import unpack_stream

from ._gptq_layout import Scheme, assembled, checked_scheme
from .interface import ForeignLinear, Importer, QuantizedFolder, group_size_for

_BITS = (2, 4, 8)


def _recognizes(config: Mapping[str, Any]) -> bool:
    return config.get("quant_method") == "olive"


def _layers(folder: QuantizedFolder) -> Sequence[ForeignLinear]:
    modules = folder.tensors.modules_with("qweight")
    if not modules:
        raise CheckpointError(f"{folder.location}: quantization_config says quantized, but no layer has a qweight")
    return [_layer(folder, module, _scheme_of(module, folder)) for module in modules]


def _scheme_of(module: str, folder: QuantizedFolder) -> Scheme:
    config, where = folder.config, folder.location
    overrides = config.get("overrides") or {}
    if not isinstance(overrides, Mapping) or not all(isinstance(own, Mapping) for own in overrides.values()):
        raise CheckpointError(f"{where}: overrides must map layers to settings, not be {overrides!r:.80}")
    patterns = (settings for key, settings in overrides.items() if _means(key, module))
    own: Mapping[str, Any] = overrides.get(module) or next(patterns, {})
    bits, group, symmetric = (
        config.get(key) if own.get(key) is None else own[key] for key in ("bits", "group_size", "symmetric")
    )
    if bits not in _BITS or group == 0:
        what = "one scale for a whole tensor is" if group == 0 else f"{bits} bits are"
        raise UnsupportedError(f"{where}: {module}: {what} not read; start from the float model: roundexport tune")
    return checked_scheme(bits, group, symmetric, 0, f"{where}: {module}")


def _means(key: str, module: str) -> bool:
    """Whether a key is a pattern (``re:…``) for a layer."""
    try:
        return key.startswith("re:") and re.fullmatch(key.removeprefix("re:"), module) is not None
    except re.error as error:
        raise CheckpointError(f"overrides: {key!r} is not a regular expression: {error}") from error


def _layer(folder: QuantizedFolder, module: str, scheme: Scheme) -> ForeignLinear:
    tensors, bits, where = folder.tensors, scheme.bits, f"{folder.location}: {module}"
    rows, held = tensors.matrix_shape(f"{module}.qweight")
    width = held * 8 // bits
    group, _ = group_size_for(scheme.group_size, width, where)
    groups = 1 if group is None else width // scheme.group_size
    tensors.check(f"{module}.qweight", ("U8",), (rows, held))
    tensors.check(f"{module}.scales", ("F16", "BF16", "F32"), (rows, groups))
    parts = [f"{module}.qweight", f"{module}.scales"]
    if not scheme.symmetric:
        tensors.check(f"{module}.qzeros", ("U8",), (rows, -(-groups * bits // 8)))
        parts.append(f"{module}.qzeros")

    def read() -> QuantizedLinear:
        scales = tensors.scales(f"{module}.scales", (rows, groups))
        if scheme.symmetric:
            zeros = np.full((rows, groups), 1 << (bits - 1), np.uint8)
        else:
            zeros = unpack_stream(np.array(tensors.read(f"{module}.qzeros")), bits, groups)
        return assembled(np.array(tensors.read(f"{module}.qweight")), scales, zeros, scheme, width, where)

    return ForeignLinear(module, rows, width, tuple(parts), read)


IMPORTER = Importer("Olive", _recognizes, _layers)
