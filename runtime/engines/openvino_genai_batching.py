"""openvino-genai's continuous batching (`ContinuousBatchingPipeline`): several prompts written together.

    add_request(number, ids, settings) -> handle        step(): one run over everything that is under way
    handle.read(): what has come since the last time    handle.cancel(): the next step forgets it

The scheduler's settings are the library's own but for the prefix cache, which is on: a prompt is read in pieces of at
most 256 tokens a run, and the cache grows as it is needed.  Everything runs in the thread that asks.

Source: https://docs.openvino.ai/2026/openvino-workflow-generative.html; tests/runtime/test_vendor_loops.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from roundexport.formats.package import PackageManifest
from roundexport.runtime.settings import GenerationSettings
from roundexport.runtime.types import BatchLoopBackend, EngineOptions

from ._openvino_genai import OpenedPipeline, answer_config, ids_tensor, open_pipeline

TARGET, LIBRARY, EXTRA = "openvino", "openvino_genai", "compare"
VENDOR = True
_NAME = "openvino_genai_batching"


def open(folder: Path, manifest: PackageManifest, options: EngineOptions) -> BatchLoopBackend:
    """Open a package; errors are those of `open_pipeline`."""

    def make(genai: Any, path: str, properties: dict[str, Any]) -> Any:
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        return genai.ContinuousBatchingPipeline(path, scheduler, "CPU", properties)

    return _Loop(*open_pipeline(_NAME, make, folder, manifest, options), manifest)


class _Loop(OpenedPipeline):
    """An opened pipeline that writes several answers together."""

    def __init__(self, pipeline: Any, info: dict[str, Any], manifest: PackageManifest) -> None:
        super().__init__(pipeline, info, manifest)
        self._asked = count()  # numbers of requests, of which none may come twice in a pipeline

    def write(self, prompt: Sequence[int], settings: GenerationSettings) -> Iterator[int]:
        """Tokens of an answer as they come, see `together`."""
        return (token for _, token in self.together([prompt], settings))

    def together(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> Iterator[tuple[int, int]]:
        """Tokens of several answers as they come, each with its prompt's place; closing the iterator ends them all.

        Raises:
            UnsupportedError: the library cannot do what the settings ask for.
        """
        configs = [answer_config(self._manifest, settings, len(prompt), _NAME) for prompt in prompts]
        handles: list[Any] = []
        try:
            for prompt, config in zip(prompts, configs, strict=True):
                handles.append(self._pipeline.add_request(next(self._asked), ids_tensor(prompt), config))
            while self._pipeline.has_non_finished_requests():
                self._pipeline.step()
                for place, handle in enumerate(handles):
                    while handle.can_read():
                        yield from ((place, int(token)) for token in handle.read().popitem()[1].generated_ids)
        finally:
            for handle in handles:
                handle.cancel()
            while self._pipeline.has_non_finished_requests():
                self._pipeline.step()
