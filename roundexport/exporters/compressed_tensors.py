"""compressed-tensors: pack-quantized folders for transformers and vLLM, of 2, 3, 4 and 8 bits.

    weight_packed [N, ⌈K·b/32⌉] I32 along K, weight_shape [2] I64, weight_scale [N, G] F16 | BF16
    weight_zero_point [⌈N·b/32⌉, G] I32 along N, where not symmetric

One of config_groups per scheme: of a single one the targets are all linears but those under `ignore`, of several the
layers' own paths.
Source: compressors/pack_quantized of compressed-tensors 0.19; at 2 and 3 bits codes lie as that version packs them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.quant.packing import pack_codes
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec
from roundexport.quant.word_packing import WORD_BITS, words_of_stream
from roundexport.storage.safetensors_reader import TensorSpec

from ._folder import FolderFormat, Model, Packing
from ._outgoing import Facts, stored

_FORMAT = "pack-quantized"


def _packing(model: Model) -> Packing:
    schemes: dict[tuple[int, int, bool], list[Facts]] = {}
    for facts in model.layers:
        schemes.setdefault((facts.spec.bits, facts.group, facts.spec.symmetric), []).append(facts)
    groups = {}
    for number, layers in enumerate(schemes.values()):
        targets = ["Linear"] if len(schemes) == 1 else [facts.name for facts in layers]
        groups[f"group_{number}"] = {
            "targets": targets, "format": _FORMAT, "weights": _weights(layers[0].spec), "input_activations": None,
            "output_activations": None,
        }  # fmt: skip
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors", "format": _FORMAT, "quantization_status": "compressed",
        "config_groups": groups, "ignore": list(model.float_modules), "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }  # fmt: skip
    return Packing(config, _tensors, _pack)


def _weights(spec: QuantSpec) -> dict[str, Any]:
    return {
        "num_bits": spec.bits, "type": "int", "symmetric": spec.symmetric,
        "strategy": "group" if spec.group_size else "channel", "group_size": spec.group_size, "dynamic": False,
        "actorder": None, "block_structure": None, "observer": None, "observer_kwargs": {},
    }  # fmt: skip


def _tensors(facts: Facts) -> dict[str, TensorSpec]:
    bits, groups = facts.spec.bits, facts.spec.groups(facts.width)
    found: dict[str, TensorSpec] = {
        "weight_packed": ("I32", (facts.rows, -(-facts.width * bits // WORD_BITS))),
        "weight_shape": ("I64", (2,)),
        "weight_scale": (facts.scales, (facts.rows, groups)),
    }
    if not facts.spec.symmetric:
        found["weight_zero_point"] = ("I32", (-(-facts.rows * bits // WORD_BITS), groups))
    return found


def _pack(facts: Facts, linear: QuantizedLinear) -> dict[str, NDArray[np.generic]]:
    found: dict[str, NDArray[np.generic]] = {
        "weight_packed": words_of_stream(linear.codes),
        "weight_shape": np.array([facts.rows, facts.width], np.int64),
        "weight_scale": stored(linear.scales, facts.scales),
    }
    if linear.zero_points is not None:
        zeros = pack_codes(np.ascontiguousarray(linear.zero_points.T), facts.spec.bits)
        found["weight_zero_point"] = words_of_stream(zeros).T
    return found


EXPORTER = FolderFormat("compressed-tensors", lambda facts: None, _packing).exporter()
