"""The float model on transformers, as a contestant of a benchmark: torch_worker.py MODEL THREADS."""

import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from roundexport.runtime.benchmarking.worker import serve

MODEL: list[Any] = []


def load() -> dict[str, Any]:
    folder, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    MODEL.append(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    config = MODEL[0].config
    return {
        "task": "generate",
        "vocab_size": config.vocab_size,
        "max_context": config.max_position_embeddings,
        "weight_bytes": sum(p.numel() * p.element_size() for p in MODEL[0].parameters()),
        "info": {
            "engine": "transformers",
            "version": torch.__version__,
            "threads": threads,
            "package": Path(folder).name,
        },
    }


@torch.inference_mode()
def generate(prompt: list[int], output_len: int) -> dict[str, Any]:
    began = time.perf_counter()
    ids, cache, tokens, times = torch.tensor([prompt]), None, [], []
    while len(tokens) < output_len:
        out = MODEL[0](input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
        times.append(time.perf_counter())
    steps = [(b - a) * 1e3 for a, b in pairwise(times)]
    return {"first_ms": (times[0] - began) * 1e3, "step_ms": steps, "tokens": tokens}


if __name__ == "__main__":
    serve(load, generate, lambda batch: {"error": "this worker writes text"})
