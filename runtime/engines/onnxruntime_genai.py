"""onnxruntime-genai: ONNX packages in its vendor's own loop (`Generator`), for comparison and for timing.

The folder is loaded as it is, by its genai_config.json; to be precise, its graph is handed over changed, see
_ort_graph.py.  Threads are set by an overlay; past and present share one buffer, as everywhere here.  Sampling is the
library's: do_sample, temperature, top_k, top_p, repetition_penalty.  It cannot go on behind an end-of-sequence token,
so where that is to be ignored the library never chooses one.

The configuration may name shared libraries (custom operators, providers' back ends) that onnxruntime-genai would load
and run.  A package for the CPU has none, so one that names any is refused, and so is one that names another graph.  A
package with roundexport's own operator names that library; it is taken where it is, byte by byte, the one that this
machine built.

Source: https://onnxruntime.ai/docs/genai/api/python.html; tests/runtime/test_vendor_loops.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from roundexport.errors import ArtifactError
from roundexport.formats.package import PackageManifest
from roundexport.kernels.native.library import COMMAND, IN_PACKAGE, built
from roundexport.runtime.settings import GenerationSettings
from roundexport.runtime.tokenizer import read_json
from roundexport.runtime.types import EngineOptions, LoopBackend
from roundexport.runtime.vendor_loop import check_device, loop_info, refuse_settings
from roundexport.storage.paths import ListedFiles
from roundexport.types import KERNELS

from ._claims import check_claims
from ._ort_graph import PRECISE, listed_graph, precision, read_shapes, refuse_properties
from ._ort_levels import with_int8_activations

TARGET, LIBRARY, EXTRA = "onnx", "onnxruntime_genai", "compare"
VENDOR = True
CONFIG = "genai_config.json"
_NAME = "onnxruntime_genai"
_UNDERSTOOD = frozenset({"temperature", "top_k", "top_p", "repetition_penalty"})


def open(folder: Path, manifest: PackageManifest, options: EngineOptions) -> LoopBackend:
    """Open a package.

    Raises:
        UsageError: another device than the CPU.
        ArtifactError: the library refuses the folder, its configuration names a library to load, or the manifest
            describes another graph.
    """
    import onnxruntime_genai as genai

    check_device(options.device, _NAME)
    refuse_properties(options)
    path = listed_graph(folder, manifest)
    check_claims(manifest, read_shapes(path, "logits"), folder)
    _check_config(folder, manifest)
    began = time.perf_counter()
    session: dict[str, Any] = dict(PRECISE) if options.precise else {}
    if options.threads is not None:
        session |= {"intra_op_num_threads": options.threads, "inter_op_num_threads": 1}
    changed = with_int8_activations(path.read_bytes()) if options.precise else b""  # the library only points to it
    overlay = {"model": {"decoder": {"session_options": session}}, "search": {"past_present_share_buffer": True}}
    try:
        config = genai.Config(str(folder))
        config.overlay(json.dumps(overlay))
        if options.precise:
            config.add_model_data(manifest.model_file, changed)
        model = genai.Model(config)
    except Exception as error:  # its exceptions share no base class
        raise ArtifactError(f"{folder}: onnxruntime-genai {genai.__version__} refuses the folder: {error}") from error
    return _Loop(model, manifest, loop_info(_NAME, LIBRARY, genai.__version__, options, precision(options), began))


def _check_config(folder: Path, manifest: PackageManifest) -> None:
    """Refuse a genai_config.json that names another graph, or a library that would be loaded and run."""
    path = ListedFiles(folder, manifest.files).path(CONFIG)
    for key, value in _entries(read_json(path)):
        if key == "filename" and value != manifest.model_file:
            raise ArtifactError(f"{path}: it names the graph {value!r}, the package's is {manifest.model_file!r}")
        if (key, value) == ("custom_ops_library", IN_PACKAGE) and manifest.settings.get(KERNELS):
            _check_library(folder)
        elif "library" in key or (key == "provider_options" and value):
            raise ArtifactError(f"{path}: {key} is refused; a package for the CPU brings no libraries; export again")


def _check_library(folder: Path) -> None:
    """Refuse a library in a package's folder that is not this machine's own."""
    path, own = folder / IN_PACKAGE, built()
    if not path.is_file() or path.read_bytes() != own.read_bytes():
        state = "is not the one that was built on this machine" if path.exists() else "is not there"
        raise ArtifactError(f"{path}, which onnxruntime-genai would load, {state}; run: {COMMAND} {folder}")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of nested objects and arrays."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner)


class _Loop:
    """An opened model."""

    def __init__(self, model: Any, manifest: PackageManifest, info: dict[str, Any]) -> None:
        self._model = model
        self._manifest = manifest
        self._info = info

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, time of opening."""
        return self._info

    def write(self, prompt: Sequence[int], settings: GenerationSettings) -> Iterator[int]:
        """Tokens of an answer as they come, end-of-sequence included.

        Raises:
            UnsupportedError: the library cannot do what the settings ask for.
        """
        import onnxruntime_genai as genai

        refuse_settings(settings, _UNDERSTOOD, _NAME)
        most = min(len(prompt) + settings.max_new_tokens, self._manifest.max_context)
        search: dict[str, Any] = {"max_length": most, "repetition_penalty": settings.repetition_penalty}
        if settings.ignore_eos:
            search["min_length"] = most
        if settings.temperature > 0:
            search |= {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p}
            search |= {"top_k": settings.top_k or self._manifest.vocab_size, "random_seed": settings.seed % 2**31}
        else:
            search["do_sample"] = False
        parameters = genai.GeneratorParams(self._model)
        parameters.set_search_options(**search)
        generator = genai.Generator(self._model, parameters)
        generator.append_tokens(np.asarray([prompt], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])
