"""The float model in transformers, as a contestant of a benchmark: torch_worker.py MODEL THREADS [DTYPE].

MODEL is what `tune` takes: a folder, a hub id that was fetched, or a GGUF file.  The loop is the shortest there is, one
forward per token with the cache that transformers keeps, logits of the last position only; ``generate`` of transformers
adds its own time to that.  A tuned artifact in float would take the same time as the model it is from, so there is
nothing to be timed in it.

Speaks the protocol of the runtime's benchmarking/worker.py; this file is apart because the runtime never imports torch.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from roundexport.errors import UsageError
from roundexport.model.checkpoint import Checkpoint

DTYPES = ("float32", "bfloat16")


class FloatModel:
    """A model in transformers.

    Args:
        model: folder, hub id or GGUF file.
        threads: worker threads.
        dtype: of weights and activations.
    """

    def __init__(self, model: str, threads: int, dtype: str) -> None:
        torch.set_num_threads(threads)
        self._checkpoint = Checkpoint.open(model, progress=False)
        self._model: Any = self._checkpoint.load_model(dtype)
        self._about = {"threads": threads, "precision": {"weights": dtype, "activations": dtype, "kv_cache": dtype}}

    def about(self) -> dict[str, Any]:
        """The reply to ``load``."""
        import transformers

        config = self._checkpoint.config.get("text_config", self._checkpoint.config)
        return {
            "task": self._checkpoint.task,
            "vocab_size": config["vocab_size"],
            "max_context": config.get("max_position_embeddings") or config.get("n_positions") or 2**31 - 1,
            "weight_bytes": sum(p.numel() * p.element_size() for p in self._model.parameters()),
            "info": {
                "engine": "torch",
                "version": f"{torch.__version__}, transformers {transformers.__version__}",
                **self._about,
                "package": Path(self._checkpoint.location).name,
            },
        }

    @torch.inference_mode()
    def generate(self, prompt: list[int], output_len: int, others: Sequence[Sequence[int]] = ()) -> dict[str, Any]:
        """Greedy tokens of one prompt, answered together with others of its length."""
        from transformers import DynamicCache

        from roundexport.model.handed_state import to_go_on
        from roundexport.runtime.benchmarking.generating import timed_reply

        began = time.perf_counter_ns()
        ids = torch.tensor([prompt, *others])
        cache, told = DynamicCache(config=self._model.config), None
        tokens: list[int] = []
        times: list[int] = []
        while len(tokens) < output_len:
            going = to_go_on(self._model, cache, ids, told)
            told = self._model(input_ids=ids, use_cache=True, logits_to_keep=1, **going)
            ids = told.logits[:, -1:].argmax(-1)
            tokens.append(int(ids[0, 0]))
            times.append(time.perf_counter_ns())
        return timed_reply(began, tokens, times)

    @torch.inference_mode()
    def embed(self, batch: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Mean of the last hidden states."""
        began = time.perf_counter()
        vectors = self._model(input_ids=torch.tensor(batch)).last_hidden_state.mean(1).float().numpy()
        ms = (time.perf_counter() - began) * 1e3
        return {"ms": ms, "sha256": hashlib.sha256(vectors.tobytes()).hexdigest()}


def main(model: str, threads: str, dtype: str = "float32") -> None:
    """Serve one model."""
    from roundexport.runtime.benchmarking.worker import serve

    if dtype not in DTYPES:
        raise UsageError(f"dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    held: list[FloatModel] = []

    def load() -> dict[str, Any]:
        held.append(FloatModel(model, int(threads), dtype))
        return held[0].about()

    def generate(prompt: list[int], output_len: int, others: Sequence[Sequence[int]] = ()) -> dict[str, Any]:
        found: dict[str, Any] = held[0].generate(prompt, output_len, others)
        return found

    def embed(batch: Sequence[Sequence[int]]) -> dict[str, Any]:
        found: dict[str, Any] = held[0].embed(batch)
        return found

    serve(load, generate, embed)


if __name__ == "__main__":
    main(*sys.argv[1:])
