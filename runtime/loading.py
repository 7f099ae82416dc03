"""Opening a package: its files are checked, then its engine's library is imported, and only that one.

An engine is a file of ``engines/``; dropping one in enrolls it.  It has

    TARGET    the packages it opens          LIBRARY   the module it runs them with, imported inside functions only
    EXTRA     what to install for that       open(folder, manifest, options) -> DecoderBackend | EncoderBackend
                                                                                | Seq2SeqBackend
    products(folder, manifest) -> tuple[Product, ...], where one product's precision can be set apart from others'
    VENDOR    True, and open gives a LoopBackend or BatchLoopBackend: a vendor's own loop, for decoders

so that every engine's file can be read where its library is missing.  ``auto`` takes the engine of the package's target
that has sessions, or for a request that a vendor's loop can answer just as well the one measured to be faster
(engine_table.py); ``choice`` of what was opened says which and why.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import cast

from roundexport import plugins
from roundexport.environment.threads import choose_threads
from roundexport.errors import RoundexportError, UnsupportedError, UsageError
from roundexport.formats.package import PackageManifest, read_package, vision_manifest
from roundexport.types import EMBEDS

from .answer_finding import AnswerFinder
from .classifying import Classifier, MaskFiller, TokenClassifier
from .embedding import Encoder
from .engine_table import choose, is_vendors
from .frame_transcription import FrameTranscriber
from .generation import Decoder
from .image_package import ImageClassifier, ImageEncoder
from .reranking import Reranker
from .seeing import SeeingDecoder
from .seq2seq_package import Seq2SeqPackage
from .settings import GenerationSettings
from .transcription import Transcriber
from .translation import Translator
from .types import DecoderBackend, EncoderBackend, EngineChoice, EngineOptions, LoopBackend, Product, Seq2SeqBackend
from .vendor_loop import LoopDecoder

_OneRun = (
    Encoder
    | Classifier
    | TokenClassifier
    | MaskFiller
    | AnswerFinder
    | ImageEncoder
    | ImageClassifier
    | FrameTranscriber
)
Package = Decoder | _OneRun | Seq2SeqPackage
_ENCODERS: dict[str, type[_OneRun]] = {
    "embed": Encoder,
    "classify": Classifier,
    "rerank": Reranker,
    "tag": TokenClassifier,
    "fill": MaskFiller,
    "answer": AnswerFinder,
    "embed_image": ImageEncoder,
    "classify_image": ImageClassifier,
    "ctc": FrameTranscriber,
}
_SEQ2SEQ_PACKAGES: dict[str, type[Seq2SeqPackage]] = {"translate": Translator, "transcribe": Transcriber}


def load(
    package: str | Path,
    engine: str = "auto",
    device: str = "CPU",
    threads: int | None = None,
    check_hashes: bool = True,
    precise: bool = False,
    request: GenerationSettings | None = None,
    *,
    properties: Mapping[str, str] | None = None,
) -> Package:
    """Open a package for use.

    Args:
        package: package folder.
        engine: ``auto``, ``ort``, ``ov``, or a vendor's own loop, ``onnxruntime-genai``, ``openvino-genai``,
            ``openvino-genai-batching``.
        device: ``CPU``, or one that the engine lists (OpenVINO: ``GPU``).
        threads: worker threads; None: physical cores inside affinity and CPU quota, see `choose_threads`.
        check_hashes: hash every file first; sizes are checked in any case.
        precise: float32 activations and cache throughout, for comparing numbers.
        request: single prompts will be answered so and nothing else asked for; with it ``auto`` may take a vendor's
            loop.
        properties: what OpenVINO's plugin is told, in its own names, as ``KV_CACHE_PRECISION``.

    Returns:
        By the package's task a `Decoder` (``generate``), `Encoder` (``embed``), `Classifier` (``classify``),
        `Reranker` (``rerank``), `TokenClassifier` (``tag``), `MaskFiller` (``fill``), `AnswerFinder` (``answer``),
        `ImageEncoder` (``embed_image``), `ImageClassifier` (``classify_image``), `FrameTranscriber` (``ctc``) or
        `Transcriber` (``transcribe``); its ``choice`` says which
        engine and why.

    Raises:
        ArtifactError: the package is damaged, or its engine refuses the graph.
        UnsupportedError: the engine is not installed, cannot open this target, or lacks the device.
        UsageError: no engine of that name, or OpenVINO has no such property or value.
    """
    folder = Path(package)
    used = choose_threads(threads)
    options = EngineOptions(device, used.count, precise, properties or {})
    manifest = read_package(folder, check_hashes)
    if engine != "auto":
        return _open(folder, manifest, options, EngineChoice(_module_name(engine), "asked for", str(used)))
    engines = _of_target(manifest.target)
    loops = _for_loops(manifest) and device.upper() == "CPU" and not precise
    plain = request if loops else None
    choice = replace(choose(manifest.target, manifest.task, engines, plain), threads=str(used))
    if not is_vendors(engines[choice.engine]):
        return _open(folder, manifest, options, choice)
    try:
        return _open(folder, manifest, options, choice)
    except RoundexportError as error:  # what auto chose must not be what fails
        ours = choose(manifest.target, manifest.task, engines, None).engine
        why = f"{choice.engine} would be faster, but: {error}"
        return _open(folder, manifest, options, EngineChoice(ours, why, str(used)))


def open_with(package: str | Path, engine: str, options: EngineOptions) -> Package:
    """Open a package in one engine with everything that engines can be told; files' hashes are not checked.

    Raises:
        ArtifactError: the package is damaged, or its engine refuses the graph.
        UnsupportedError: the engine is not installed, cannot open this target, or lacks the device.
        UsageError: no engine of that name.
    """
    name, folder = _module_name(engine), Path(package)
    return _open(folder, read_package(folder, check_hashes=False), options, EngineChoice(name, "asked for"))


def _module_name(engine: str) -> str:
    """An engine's file, by the name that its library has elsewhere too."""
    name = engine.replace("-", "_")
    return {"onnxruntime": "ort", "openvino": "ov"}.get(name, name)


def _open(folder: Path, manifest: PackageManifest, options: EngineOptions, choice: EngineChoice) -> Package:
    """A package in an engine."""
    module = _engine(folder, manifest, choice.engine)
    backend = module.open(folder, manifest, options)
    opened: Package
    if is_vendors(module):
        opened = LoopDecoder(cast(LoopBackend, backend), manifest, folder)
    elif vision_manifest(manifest) is not None:
        vision = module.open_vision(folder, manifest, options)
        opened = SeeingDecoder(cast(DecoderBackend, backend), manifest, folder, vision)
    elif manifest.task == "generate":
        opened = Decoder(cast(DecoderBackend, backend), manifest, folder)
    elif manifest.task in _SEQ2SEQ_PACKAGES:
        opened = _SEQ2SEQ_PACKAGES[manifest.task](cast(Seq2SeqBackend, backend), manifest, folder)
    else:
        opened = _ENCODERS[manifest.task](cast(EncoderBackend, backend), manifest, folder)
    opened.choice = choice
    return opened


def _engine(folder: Path, manifest: PackageManifest, name: str) -> ModuleType:
    """The module of an engine that can open this package here."""
    module = plugins.load("engines", name)
    if manifest.target != module.TARGET:
        ours = choose(manifest.target, manifest.task, _of_target(manifest.target), None).engine
        raise UsageError(
            f"{folder}: engine {name!r} opens packages for {module.TARGET}, this one is for {manifest.target}; "
            f"use engine {ours!r} or auto"
        )
    if importlib.util.find_spec(module.LIBRARY) is None:
        raise UnsupportedError(
            f"{folder}: a package for {manifest.target} needs {module.LIBRARY}, which is not installed; "
            f"pip install 'roundexport[{module.EXTRA}]'"
        )
    if is_vendors(module) and not _for_loops(manifest):
        what = "graph reads vectors" if manifest.task == "generate" else f"task is {manifest.task}"
        raise UnsupportedError(
            f"{folder}: engine {name} is used for decoders of token ids here, this package's {what}; use engine auto"
        )
    return module


def _for_loops(manifest: PackageManifest) -> bool:
    """Whether a vendor's own loop can write with a package: decoders whose graph reads token ids."""
    return manifest.task == "generate" and not manifest.settings.get(EMBEDS)


def _of_target(target: str) -> dict[str, ModuleType]:
    """Engines that open packages for a target, by name."""
    engines = {name: plugins.load("engines", name) for name in plugins.names("engines")}
    found = {name: module for name, module in engines.items() if target == module.TARGET}
    if all(map(is_vendors, found.values())):
        raise UnsupportedError(f"no engine here opens packages for {target}; there are {', '.join(engines)}")
    return found


def installed(package: str | Path) -> list[str]:
    """Names of the engines that open a package here: the one with sessions, then vendors' loops that are installed.

    Raises:
        ArtifactError: not a package.
        UnsupportedError: no engine opens packages of its target.
    """
    manifest = read_package(Path(package), check_hashes=False)
    engines = _of_target(manifest.target)
    ours = [name for name, module in engines.items() if not is_vendors(module)]
    vendors = [name for name, module in engines.items() if is_vendors(module) and _for_loops(manifest)]
    return [*ours, *(name for name in vendors if importlib.util.find_spec(engines[name].LIBRARY) is not None)]


def products(package: str | Path, engine: str) -> tuple[Product, ...]:
    """Products of a package's graph, each of which an engine can open with activations of its own precision.

    Raises:
        UnsupportedError: the engine cannot tell one product's precision from another's.
        ArtifactError: the package is damaged.
    """
    folder, name = Path(package), _module_name(engine)
    manifest = read_package(folder, check_hashes=False)
    module = _engine(folder, manifest, name)
    if not hasattr(module, "products"):
        raise UnsupportedError(f"{folder}: engine {name} has one precision for all products of a package")
    found: tuple[Product, ...] = module.products(folder, manifest)
    return found


def is_vendors_loop(engine: str) -> bool:
    """Whether an engine of that name, or what `load` takes for ``auto``, is a vendor's own loop.

    Raises:
        UsageError: no engine of that name.
    """
    return engine != "auto" and is_vendors(plugins.load("engines", _module_name(engine)))


def opens(engine: str, package: str | Path) -> bool:
    """Whether an engine of that name opens packages of this one's target.

    Raises:
        UsageError: no engine of that name.
        ArtifactError: not a package.
    """
    module = plugins.load("engines", _module_name(engine))
    return bool(module.TARGET == read_package(Path(package), check_hashes=False).target)
