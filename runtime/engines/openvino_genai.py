"""openvino-genai: OpenVINO packages in its vendor's own loop (`LLMPipeline`), for comparison and for timing.

The folder is loaded as it is.  The pipeline takes its own defaults (paged attention, continuous batching of one,
prefix cache on, so prompts must differ to be timed); the number of threads is set.  Tokens come through a streamer, in
a thread of the pipeline's own, and are handed over by a queue.  Sampling is the library's.

Source: https://docs.openvino.ai/2026/openvino-workflow-generative.html; tests/runtime/test_vendor_loops.py.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from roundexport.environment.openvino_import import import_openvino
from roundexport.errors import ArtifactError, UnsupportedError
from roundexport.formats.package import PackageManifest
from roundexport.runtime.settings import GenerationSettings
from roundexport.runtime.types import EngineOptions, LoopBackend
from roundexport.runtime.vendor_loop import checked_options, loop_info, refuse_settings

from ._claims import check_claims
from ._ov_graph import fixed_states, graph_shapes, listed_files

TARGET, LIBRARY, EXTRA = "openvino", "openvino_genai", "compare"
VENDOR = True
_NAME = "openvino_genai"
_UNDERSTOOD = frozenset(
    {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
)


def open(folder: Path, manifest: PackageManifest, options: EngineOptions) -> LoopBackend:
    """Open a package.

    Raises:
        UnsupportedError: float32 throughout was asked for, or layers carry other state than keys and values.
        UsageError: another device than the CPU.
        ArtifactError: the library refuses the folder, or the manifest describes another graph.
    """
    ov = import_openvino()
    import openvino_genai as genai

    checked_options(options.device, options.precise, _NAME)
    path, weights = listed_files(folder, manifest)
    began = time.perf_counter()
    properties = {} if options.threads is None else {"INFERENCE_NUM_THREADS": options.threads}
    try:
        model = ov.Core().read_model(path, weights)
        check_claims(manifest, graph_shapes(model, "logits"), folder)
        if fixed_states(model):
            raise UnsupportedError(f"{folder}: engine {_NAME} is not used where layers carry other state than a cache")
        pipeline = genai.LLMPipeline(str(folder), "CPU", **properties)
    except RuntimeError as error:
        raise ArtifactError(f"{folder}: openvino-genai refuses the folder: {error}") from error
    return _Loop(pipeline, manifest, loop_info(_NAME, LIBRARY, genai.__version__, options, began))


class _Loop:
    """An opened pipeline."""

    def __init__(self, pipeline: Any, manifest: PackageManifest, info: dict[str, Any]) -> None:
        self._pipeline = pipeline
        self._manifest = manifest
        choice = "the plugin's choice"
        self._info = {**info, "precision": {"activations": choice, "kv_cache": choice}}

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, time of opening."""
        return self._info

    def write(self, prompt: Sequence[int], settings: GenerationSettings) -> Iterator[int]:
        """Tokens of an answer as they come, end-of-sequence included; closing the iterator stops the pipeline.

        Raises:
            UnsupportedError: the library cannot do what the settings ask for.
        """
        refuse_settings(settings, _UNDERSTOOD, _NAME)
        come: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        stop = threading.Event()
        thread = threading.Thread(target=self._run, args=(list(prompt), settings, come, stop), daemon=True)
        thread.start()
        try:
            while (token := come.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                yield token
        finally:
            stop.set()
            thread.join()

    def _run(
        self,
        prompt: list[int],
        settings: GenerationSettings,
        come: queue.SimpleQueue[int | BaseException | None],
        stop: threading.Event,
    ) -> None:
        ov = import_openvino()
        import openvino_genai as genai

        class Streamer(genai.StreamerBase):  # type: ignore[misc]
            """Hands tokens over."""

            def write(self, token: int | list[int]) -> Any:
                for one in token if isinstance(token, list) else [token]:
                    come.put(int(one))
                return genai.StreamingStatus.CANCEL if stop.is_set() else genai.StreamingStatus.RUNNING

            def end(self) -> None:
                """Nothing is held back."""

        try:
            ids = np.asarray([prompt], np.int64)
            inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
            self._pipeline.generate(inputs, self._config(settings, len(prompt)), Streamer())
            come.put(None)
        except BaseException as error:
            come.put(error)

    def _config(self, settings: GenerationSettings, prompt_len: int) -> Any:
        import openvino_genai as genai

        config = genai.GenerationConfig()
        config.max_new_tokens = min(settings.max_new_tokens, self._manifest.max_context - prompt_len)
        config.ignore_eos = settings.ignore_eos
        config.stop_token_ids = set() if settings.ignore_eos else set(self._manifest.tokens["eos"])
        config.do_sample = settings.temperature > 0
        config.repetition_penalty = settings.repetition_penalty
        config.presence_penalty = settings.presence_penalty
        config.frequency_penalty = settings.frequency_penalty
        if config.do_sample:
            config.temperature, config.top_p, config.rng_seed = settings.temperature, settings.top_p, settings.seed
            config.min_p = settings.min_p
            config.top_k = settings.top_k or self._manifest.vocab_size
        return config
