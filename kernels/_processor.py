"""Which products of short numbers are fast here: what the processor has, less what oneDNN was told not to use.

torch says what the processor has.  oneDNN, which does torch's products of bfloat16 and of eight-bit numbers, uses no
more than ``ONEDNN_MAX_CPU_ISA`` allows.  Beyond it bfloat16 is emulated, a hundred times slower, and eight-bit products
saturate in 16 bits on the way (AVX2: VPMADDUBSW), so they are wrong.  So the variable must count here too.  With it a
newer processor stands for an older one where time is measured (samples/compare_tuners/block_cost.py).

In: nothing.  Out: names as of ``torch.cpu.get_capabilities``.  Source: oneDNN's page "CPU Dispatcher Control".
"""

from __future__ import annotations

import importlib
import os

_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_SHORT = ("avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_ALLOWED: dict[str, tuple[str, ...]] = {
    "SSE41": (),
    "AVX": (),
    "AVX2": (),
    "AVX2_VNNI": _SHORT[:1],
    "AVX2_VNNI_2": _SHORT[:1],
    "AVX512_CORE": (),
    "AVX512_CORE_VNNI": _SHORT[:2],
    "AVX512_CORE_BF16": _SHORT[:3],
    "AVX512_CORE_FP16": _SHORT[:3],
    "AVX10_1_512": _SHORT[:3],
}
"""What of _SHORT a limit leaves; a limit that is not here leaves all of it."""


def short_products() -> frozenset[str]:
    """Instructions for products of bfloat16 and eight-bit numbers that are there and may be used."""
    has = importlib.import_module("torch").cpu.get_capabilities()
    limit = next((os.environ[name] for name in _VARIABLES if os.environ.get(name)), "DEFAULT")
    return frozenset(name for name in _ALLOWED.get(limit.upper(), _SHORT) if has.get(name))
