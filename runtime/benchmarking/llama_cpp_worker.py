"""llama.cpp as a contestant: llama_cpp_worker.py GGUF THREADS, through llama-cpp-python, else through `llama-bench`.

llama-cpp-python: its C functions are called directly, so that times are llama.cpp's own: the prompt in one batch (split
as llama.cpp splits it), the likeliest of the last logits, one token after the other.  The cache is float16, flash
attention is llama.cpp's choice, weights are repacked for the processor, as llama-bench has it too.

llama-bench: for every request two runs of it, ``-p PROMPT -n 0`` and ``-p 0 -n TOKENS -d PROMPT``, each with a warm-up
of its own.  It reads random tokens, chooses none and tells averages, so there are no gaps between tokens, nothing to
hash, and its mean per token stands for all of them.

Source: https://github.com/ggml-org/llama.cpp (tools/llama-bench), https://github.com/abetlen/llama-cpp-python.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from roundexport.errors import RoundexportError, UnsupportedError
from roundexport.runtime.benchmarking.generating import timed_reply
from roundexport.runtime.benchmarking.worker import Reply, serve

_BATCH = 2048  # tokens that one call takes, llama.cpp's default


class Bindings:
    """A GGUF file in llama-cpp-python.

    Args:
        file: the GGUF file.
        threads: worker threads.
    """

    def __init__(self, file: Path, threads: int) -> None:
        import llama_cpp as api

        self._api, self._threads = api, threads
        self._silent = api.llama_log_callback(lambda *_: None)  # kept: C holds no reference
        api.llama_log_set(self._silent, None)
        api.llama_backend_init()
        options = api.llama_model_default_params()
        self._model = api.llama_model_load_from_file(str(file).encode(), options)
        if not self._model:
            raise RoundexportError(f"{file}: llama.cpp cannot load it")
        self.vocab_size: int = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self.max_context: int = api.llama_model_n_ctx_train(self._model)
        self.weight_bytes: int = api.llama_model_size(self._model)
        self._context: Any = None
        self._room = 0
        self._begin(_BATCH)

    def info(self) -> dict[str, Any]:
        """Engine, version, threads, precisions."""
        return {
            "engine": "llama.cpp",
            "version": f"llama-cpp-python {self._api.__version__}",
            "threads": self._threads,
            "precision": {"activations": "8 bits by blocks", "kv_cache": "f16"},
        }

    def generate(self, prompt: list[int], output_len: int, others: Sequence[Sequence[int]] = ()) -> Reply:
        """Greedy tokens of one prompt."""
        if others:
            raise UnsupportedError("llama.cpp is timed with one prompt at a time here")
        self._begin(len(prompt) + output_len)
        began = time.perf_counter_ns()
        tokens, times = [self._next(prompt)], [time.perf_counter_ns()]
        while len(tokens) < output_len:
            tokens.append(self._next(tokens[-1:]))
            times.append(time.perf_counter_ns())
        return timed_reply(began, tokens, times)

    def _next(self, tokens: Sequence[int]) -> int:
        """The likeliest token behind these."""
        api = self._api
        for start in range(0, len(tokens), _BATCH):
            part = tokens[start : start + _BATCH]
            ids = (api.llama_token * len(part))(*part)  # named: the batch only points at it
            if code := api.llama_decode(self._context, api.llama_batch_get_one(ids, len(part))):
                raise RoundexportError(f"llama.cpp: llama_decode failed with code {code}")
        logits = api.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())

    def _begin(self, room: int) -> None:
        """An empty cache with room for so many tokens."""
        api = self._api
        if room <= self._room:
            api.llama_memory_clear(api.llama_get_memory(self._context), True)
            return
        if self._context:
            api.llama_free(self._context)
        options = api.llama_context_default_params()
        options.n_ctx, options.n_batch = room, _BATCH
        options.n_threads = options.n_threads_batch = self._threads
        self._context, self._room = api.llama_init_from_model(self._model, options), room
        if not self._context:
            raise RoundexportError(f"llama.cpp cannot make a context of {room} tokens")


class BenchTool:
    """A GGUF file in `llama-bench`.

    Args:
        program: the tool.
        file: the GGUF file.
        threads: worker threads.
    """

    def __init__(self, program: str, file: Path, threads: int) -> None:
        self._command = [program, "-m", str(file), "-t", str(threads), "-r", "1", "-o", "json"]
        self._threads = threads
        self.vocab_size, self.max_context = 2**31 - 1, 2**31 - 1  # it reads tokens of its own, and checks none
        self._about = self._run("-p", "1", "-n", "0")
        self.weight_bytes: int = self._about["model_size"]

    def info(self) -> dict[str, Any]:
        """Engine, version, threads, precisions."""
        return {
            "engine": "llama.cpp",
            "version": f"llama-bench {self._about['build_commit']}",
            "threads": self._threads,
            "precision": {"activations": "8 bits by blocks", "kv_cache": self._about["type_k"]},
        }

    def generate(self, prompt: list[int], output_len: int, others: Sequence[Sequence[int]] = ()) -> Reply:
        """Times of reading so many tokens, and of writing so many behind them."""
        if others:
            raise UnsupportedError("llama.cpp is timed with one prompt at a time here")
        first = self._run("-p", str(len(prompt)), "-n", "0")["avg_ns"]
        steps = self._run("-p", "0", "-n", str(output_len - 1), "-d", str(len(prompt)))["avg_ns"]
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        return {"first_ms": first / 1e6, "tpot_ms": steps / 1e6 / (output_len - 1), "peak_rss": peak}

    def _run(self, *arguments: str) -> dict[str, Any]:
        done = subprocess.run([*self._command, *arguments], capture_output=True, text=True, check=False)
        try:
            found: dict[str, Any] = json.loads(done.stdout)[0]
        except (ValueError, LookupError) as error:
            told = (done.stderr or done.stdout).strip()[-1000:]
            raise RoundexportError(f"llama-bench ended with code {done.returncode}: {told or 'no message'}") from error
        return found


def opened(file: Path, threads: int) -> Bindings | BenchTool:
    """A GGUF file in what is installed.

    Raises:
        RoundexportError: the file is not there, or llama.cpp refuses it.
        UnsupportedError: neither llama-cpp-python nor llama-bench is there.
    """
    if not file.is_file():
        raise RoundexportError(f"there is no file {file}; --gguf names the model for llama.cpp")
    if importlib.util.find_spec("llama_cpp") is not None:
        return Bindings(file, threads)
    if program := shutil.which("llama-bench"):
        return BenchTool(program, file, threads)
    raise UnsupportedError(
        "llama.cpp was not found: pip install llama-cpp-python beside roundexport, or put llama-bench on the PATH"
    )


def main(file: str, threads: str) -> None:
    """Serve one GGUF file."""
    held: list[Bindings | BenchTool] = []

    def load() -> Reply:
        model = opened(Path(file), int(threads))
        held.append(model)
        return {
            "task": "generate",
            "vocab_size": model.vocab_size,
            "max_context": model.max_context,
            "weight_bytes": model.weight_bytes,
            "info": {**model.info(), "package": Path(file).name},
        }

    def generate(prompt: list[int], output_len: int, others: Sequence[Sequence[int]] = ()) -> Reply:
        return held[0].generate(prompt, output_len, others)

    def embed(_: Any) -> Reply:
        raise UnsupportedError("llama.cpp is timed with decoders here")

    serve(load, generate, embed)


if __name__ == "__main__":
    main(*sys.argv[1:])
