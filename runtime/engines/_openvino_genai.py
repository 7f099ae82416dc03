"""What openvino-genai's two loops have in common: checks before a folder is opened, precisions, settings of answers.

The library compiles the graph itself and does not show what came of it, so the precisions are said to it, see
`stated`; `info` gives what was said.  Sampling is the library's.

Source: https://docs.openvino.ai/2026/openvino-workflow-generative.html; tests/runtime/test_vendor_loops.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from roundexport.environment.openvino_import import import_openvino
from roundexport.errors import ArtifactError, UnsupportedError
from roundexport.formats.package import PackageManifest
from roundexport.runtime.settings import GenerationSettings
from roundexport.runtime.types import EngineOptions
from roundexport.runtime.vendor_loop import check_device, loop_info, refuse_settings

from ._claims import check_claims
from ._ov_graph import fixed_states, graph_shapes, listed_files
from ._ov_properties import PRECISIONS, stated

_UNDERSTOOD = frozenset(
    {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
)
Make = Callable[[Any, str, dict[str, Any]], Any]


class OpenedPipeline:
    """A pipeline, what is said of it, and the manifest of its package."""

    def __init__(self, pipeline: Any, info: dict[str, Any], manifest: PackageManifest) -> None:
        self._pipeline = pipeline
        self._info = info
        self._manifest = manifest

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, time of opening."""
        return self._info


def open_pipeline(
    engine: str, make: Make, folder: Path, manifest: PackageManifest, options: EngineOptions
) -> tuple[Any, dict[str, Any]]:
    """A pipeline of a package's folder, and what is said of it.

    Args:
        engine: its name.
        make: (the library, folder, properties) -> pipeline.
        folder: the package.
        manifest: its description.
        options: how it is opened.

    Raises:
        UnsupportedError: layers carry other state than keys and values.
        UsageError: another device than the CPU.
        ArtifactError: the library refuses the folder, or the manifest describes another graph.
    """
    ov = import_openvino()
    import openvino_genai as genai

    check_device(options.device, engine)
    path, weights = listed_files(folder, manifest)
    core = ov.Core()
    began = time.perf_counter()
    try:
        model = core.read_model(path, weights)
        check_claims(manifest, graph_shapes(model, "logits"), folder)
        if fixed_states(model):
            raise UnsupportedError(f"{folder}: engine {engine} is not used where layers carry other state than a cache")
        properties = stated(core, "CPU", options, model)
        pipeline = make(genai, str(folder), properties)
    except RuntimeError as error:
        raise ArtifactError(f"{folder}: openvino-genai refuses the folder: {error}") from error
    precision = {label: properties[name] for label, name in PRECISIONS.items() if name in properties}
    return pipeline, loop_info(engine, "openvino_genai", genai.__version__, options, precision, began)


def ids_tensor(prompt: Sequence[int]) -> Any:
    """Token ids [1, S] as the library takes them."""
    return import_openvino().Tensor(np.asarray([prompt], np.int64))


def answer_config(manifest: PackageManifest, settings: GenerationSettings, prompt_len: int, engine: str) -> Any:
    """The library's settings of one answer.

    Raises:
        UnsupportedError: the library cannot do what the settings ask for.
    """
    import openvino_genai as genai

    refuse_settings(settings, _UNDERSTOOD, engine)
    config = genai.GenerationConfig()
    config.max_new_tokens = min(settings.max_new_tokens, manifest.max_context - prompt_len)
    config.ignore_eos = settings.ignore_eos
    config.stop_token_ids = set() if settings.ignore_eos else set(manifest.tokens["eos"])
    config.do_sample = settings.temperature > 0
    config.repetition_penalty = settings.repetition_penalty
    config.presence_penalty = settings.presence_penalty
    config.frequency_penalty = settings.frequency_penalty
    if config.do_sample:
        config.temperature, config.top_p, config.rng_seed = settings.temperature, settings.top_p, settings.seed
        config.min_p = settings.min_p
        config.top_k = settings.top_k or manifest.vocab_size
    return config
