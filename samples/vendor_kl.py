"""KL of ONNX packages that any builder made of one model, and of GGUF files: whole windows, each in its own runtime.

    python samples/vendor_kl.py MODEL PACKAGE… [--samples 16] [--length 512]

PACKAGE… as bench_vendor_onnx.py prints them for this very MODEL (its --model); another's packages are of other weights.

A package is a folder with a model.onnx as onnxruntime-genai takes it (input_ids, attention_mask, perhaps position_ids,
past_key_values.i.key|value to logits), so the vendor's builder and ours are measured by the same code on the same
tokens: the text that `verify` takes.  Products are as the graph says (accuracy_level), the cache is float32.

A PACKAGE that ends in .gguf runs in llama.cpp (`pip install llama-cpp-python`) as it comes: activations in 8 bits by
blocks, cache in float16.  Files of MODEL's weights: compare_tuners/llama_files.py.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.calibration.text import cut_samples, encoder_of
from roundexport.kernels.native.library import DOMAIN, built
from roundexport.model.checkpoint import Checkpoint
from roundexport.progress import Progress
from roundexport.runtime.engines._onnx_file import domains
from roundexport.runtime.machine import machine_info
from roundexport.verification.decoder import measure_decoder
from roundexport.verification.heldout import BUNDLED, read_heldout

TYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}


class Graph:
    """A decoder graph with an empty cache."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        if DOMAIN in domains(path):
            options.register_custom_ops_library(str(built()))
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.width = json.loads((path.parent / "genai_config.json").read_text())["model"]["decoder"]["head_size"]

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [B, S, V] of whole windows [B, S]."""
        batch, length = ids.shape
        whole = {
            "input_ids": ids, "attention_mask": np.ones_like(ids),
            "position_ids": np.broadcast_to(np.arange(length), ids.shape),
        }  # fmt: skip
        feeds = {}
        for node in self.session.get_inputs():
            values = whole.get(node.name)
            if values is None:  # a cache [B, heads, 0, width]
                values = np.zeros((batch, node.shape[1], 0, self.width))  # not every graph names the width
            feeds[node.name] = np.ascontiguousarray(values, TYPES[node.type])
        return self.session.run(["logits"], feeds)[0]

    def greedy(self, prompts: list[list[int]], count: int) -> list[NDArray[np.int64]]:
        """The likeliest next tokens."""
        return greedy(self.logits, prompts, count)


class GgufFile:
    """A GGUF file in llama.cpp."""

    def __init__(self, path: Path, threads: int) -> None:
        from llama_cpp import Llama

        self.path, self.threads, self.kind = str(path), threads, Llama
        self.model: Any = None

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [B, S, V] of whole windows [B, S]."""
        length = ids.shape[1]
        if self.model is None or self.model.n_ctx() < length:
            self.model = self.kind(
                self.path, n_ctx=length, n_batch=length, n_ubatch=length, n_threads=self.threads,
                n_threads_batch=self.threads, logits_all=True, verbose=False,
            )  # fmt: skip
        found = []
        for window in ids.tolist():
            self.model.reset()
            self.model.eval(window)
            found.append(self.model.scores[:length].copy())
        return np.stack(found)

    def greedy(self, prompts: list[list[int]], count: int) -> list[NDArray[np.int64]]:
        """The likeliest next tokens."""
        return greedy(self.logits, prompts, count)


def greedy(
    logits: Callable[[NDArray[np.int64]], NDArray[np.float32]], prompts: list[list[int]], count: int
) -> list[NDArray[np.int64]]:
    """The likeliest next tokens, each by a whole window."""
    ids = np.array(prompts)
    for _ in range(count):
        ids = np.concatenate([ids, logits(ids)[:, -1].argmax(-1)[:, None]], 1)
    return list(ids[:, len(prompts[0]) :])


def opened(package: Path, threads: int) -> Graph | GgufFile:
    """What runs a package."""
    return GgufFile(package, threads) if package.suffix == ".gguf" else Graph(package / "model.onnx", threads)


def size_mb(package: Path) -> float:
    """Megabytes of what holds the weights."""
    held = (
        [package] if package.is_file() else [path for path in package.iterdir() if path.name.startswith("model.onnx")]
    )
    return sum(path.stat().st_size for path in held) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("packages", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    checkpoint = Checkpoint.open(given.model)
    ids = cut_samples(
        encoder_of(checkpoint), lambda _: read_heldout(BUNDLED), "held-out text", given.samples, given.length
    )
    print("| package | MB | KL, nats | top-1 | perplexity (float) |")
    print("|---|--:|--:|--:|--:|", flush=True)
    for package in given.packages:
        found = measure_decoder(checkpoint, opened(package, given.threads), ids, horizon=1,
                                shown=Progress(enabled=False))  # type: ignore[arg-type]  # fmt: skip
        perplexity = f"{found.perplexity:.3f} ({found.perplexity_float:.3f})"
        print(
            f"| {package.name} | {size_mb(package):.1f} | {found.kl} | {found.top1.mean:.4f} | {perplexity} |",
            flush=True,
        )
    info = machine_info()
    print(json.dumps({key: info[key] for key in ("cpu", "instruction_sets", "versions")}))


if __name__ == "__main__":
    main()
