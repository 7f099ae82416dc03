"""openvino-genai: OpenVINO packages in its vendor's own loop (`LLMPipeline`), for comparison and for timing.

The folder is loaded as it is.  The pipeline takes its own defaults (paged attention, continuous batching of one,
prefix cache on, so prompts must differ to be timed); threads and precisions are set.  Tokens come through a streamer,
in a thread of the pipeline's own, and are handed over by a queue.  Several together: openvino_genai_batching.py.

Source: https://docs.openvino.ai/2026/openvino-workflow-generative.html; tests/runtime/test_vendor_loops.py.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from roundexport.environment.openvino_import import import_openvino
from roundexport.formats.package import PackageManifest
from roundexport.runtime.settings import GenerationSettings
from roundexport.runtime.types import EngineOptions, LoopBackend

from ._openvino_genai import OpenedPipeline, answer_config, ids_tensor, open_pipeline

TARGET, LIBRARY, EXTRA = "openvino", "openvino_genai", "compare"
VENDOR = True
_NAME = "openvino_genai"


def open(folder: Path, manifest: PackageManifest, options: EngineOptions) -> LoopBackend:
    """Open a package; errors are those of `open_pipeline`."""

    def make(genai: Any, path: str, properties: dict[str, Any]) -> Any:
        return genai.LLMPipeline(path, "CPU", **properties)

    return _Loop(*open_pipeline(_NAME, make, folder, manifest, options), manifest)


class _Loop(OpenedPipeline):
    """An opened pipeline that writes one answer at a time."""

    def write(self, prompt: Sequence[int], settings: GenerationSettings) -> Iterator[int]:
        """Tokens of an answer as they come, end-of-sequence included; closing the iterator stops the pipeline.

        Raises:
            UnsupportedError: the library cannot do what the settings ask for.
        """
        config = answer_config(self._manifest, settings, len(prompt), _NAME)
        come: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        stop = threading.Event()
        thread = threading.Thread(target=self._run, args=(prompt, config, come, stop), daemon=True)
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
        prompt: Sequence[int],
        config: Any,
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
            mask = ov.Tensor(np.ones((1, len(prompt)), np.int64))
            self._pipeline.generate(genai.TokenizedInputs(ids_tensor(prompt), mask), config, Streamer())
            come.put(None)
        except BaseException as error:
            come.put(error)
