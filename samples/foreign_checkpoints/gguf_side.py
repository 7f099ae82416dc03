"""GGUF files that llama.cpp quantizes, in its own environment, and the matrices that its own code makes of them.

    gguf_side.py FILE OUT [NAME…]

FILE is a GGUF file of any type that holds a tokenizer; llama.cpp turns it into float32 first.  Each folder gets
model.gguf and owner.safetensors: every quantized tensor by its name in the file, dequantized by ggml's own C function.
K types need rows of 256 weights; where a model's are others llama.cpp takes Q5_0, Q5_1, Q8_0 or IQ4_NL for them.
"""

import ctypes
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import llama_cpp
import numpy as np
from cases import make
from safetensors.numpy import save_file

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K")
CASES: dict[str, dict[str, Any]] = {
    f"gguf-by-llama.cpp-{kind}": {"type": f"LLAMA_FTYPE_MOSTLY_{kind}"} for kind in TYPES
}
GGML = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.rglob("libggml-base.so"))))


def quantize(source: Path, out: Path, kind: str) -> None:
    """`llama-quantize --allow-requantize`."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = getattr(llama_cpp, kind), 1, True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not make {kind}")


def dequantized(tensor: gguf.ReaderTensor) -> np.ndarray:
    """A tensor's values, by ggml's own function."""
    values = np.empty([int(size) for size in tensor.shape[::-1]], np.float32)
    blocks = np.ascontiguousarray(tensor.data)
    rows = getattr(GGML, f"dequantize_row_{tensor.tensor_type.name.lower().replace('_k', '_K')}")
    rows(blocks.ctypes.data_as(ctypes.c_void_p), values.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(values.size))
    return values


def main(file: str, out: Path, names: list[str]) -> int:
    """Make every case that is asked for, all by default; returns how many failed."""
    with TemporaryDirectory(dir=out) as apart:
        whole = Path(apart) / "float.gguf"

        def one(name: str, settings: dict[str, Any], folder: Path) -> None:
            if not whole.exists():
                quantize(Path(file), whole, "LLAMA_FTYPE_ALL_F32")
            folder.mkdir()
            quantize(whole, folder / "model.gguf", settings["type"])
            tensors = gguf.GGUFReader(folder / "model.gguf").tensors
            found = {tensor.name: dequantized(tensor) for tensor in tensors if tensor.tensor_type.name != "F32"}
            save_file(found, folder / "owner.safetensors")

        return make(CASES, one, "", out, names, "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]) > 0)
