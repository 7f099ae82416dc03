"""Opening a package: its files are checked, then its engine's library is imported, and only that one.

An engine is a file of ``engines/``; dropping one in enrolls it.  It has

    TARGET    the packages it opens          LIBRARY   the module it runs them with, imported inside functions only
    EXTRA     what to install for that       open(folder, manifest, options) -> DecoderBackend | EncoderBackend
    VENDOR    True, and open gives a LoopBackend: a vendor's own loop, for decoders

so that every engine's file can be read where its library is missing.  ``auto`` takes the engine of the package's target
that has sessions; a vendor's loop is taken where it is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import cast

from roundexport import plugins
from roundexport.errors import UnsupportedError, UsageError
from roundexport.formats.package import PackageManifest, read_package
from roundexport.threads import choose_threads

from .embedding import Encoder
from .generation import Decoder
from .types import DecoderBackend, EncoderBackend, EngineOptions, LoopBackend
from .vendor_loop import LoopDecoder


def load(
    package: str | Path,
    engine: str = "auto",
    device: str = "CPU",
    threads: int | None = None,
    check_hashes: bool = True,
    precise: bool = False,
) -> Decoder | Encoder:
    """Open a package for use.

    Args:
        package: package folder.
        engine: ``auto`` (the engine of the package's target), ``ort``, ``ov``, or a vendor's own loop,
            ``onnxruntime-genai``, ``openvino-genai``.
        device: ``CPU``, or one that the engine lists (OpenVINO: ``GPU``).
        threads: worker threads; None: physical cores inside affinity and CPU quota, see `choose_threads`.
        check_hashes: hash every file first; sizes are checked in any case.
        precise: float32 activations and cache throughout, for comparing numbers.

    Returns:
        A `Decoder` (task ``generate``) or an `Encoder` (task ``embed``).

    Raises:
        ArtifactError: the package is damaged, or its engine refuses the graph.
        UnsupportedError: the engine is not installed, cannot open this target, or lacks the device.
        UsageError: no engine of that name.
    """
    folder = Path(package)
    options = EngineOptions(device, choose_threads(threads).count, precise)
    manifest = read_package(folder, check_hashes)
    module = _engine(folder, manifest, engine.replace("-", "_"))
    backend = module.open(folder, manifest, options)
    if _is_vendors(module):
        return LoopDecoder(cast(LoopBackend, backend), manifest, folder)
    if manifest.task == "generate":
        return Decoder(cast(DecoderBackend, backend), manifest, folder)
    return Encoder(cast(EncoderBackend, backend), manifest, folder)


def _engine(folder: Path, manifest: PackageManifest, engine: str) -> ModuleType:
    """The module of an engine that can open this package here."""
    engines = {name: plugins.load("engines", name) for name in plugins.names("engines")}
    name = _engine_of(manifest.target, engines) if engine == "auto" else engine
    module = engines[name] if name in engines else plugins.load("engines", name)  # which refuses it
    if manifest.target != module.TARGET:
        raise UsageError(
            f"{folder}: engine {name!r} opens packages for {module.TARGET}, this one is for {manifest.target}; "
            f"use engine {_engine_of(manifest.target, engines)!r} or auto"
        )
    if importlib.util.find_spec(module.LIBRARY) is None:
        raise UnsupportedError(
            f"{folder}: a package for {manifest.target} needs {module.LIBRARY}, which is not installed; "
            f"pip install 'roundexport[{module.EXTRA}]'"
        )
    if _is_vendors(module) and manifest.task != "generate":
        raise UnsupportedError(f"{folder}: engine {name} is used for decoders here, this package is an encoder")
    return module


def _is_vendors(module: ModuleType) -> bool:
    """Whether an engine is a vendor's own loop."""
    return bool(getattr(module, "VENDOR", False))


def opens(engine: str, package: str | Path) -> bool:
    """Whether an engine of that name opens packages of this one's target.

    Raises:
        UsageError: no engine of that name.
        ArtifactError: not a package.
    """
    module = plugins.load("engines", engine.replace("-", "_"))
    return bool(module.TARGET == read_package(Path(package), check_hashes=False).target)


def _engine_of(target: str, engines: Mapping[str, ModuleType]) -> str:
    """The engine with sessions that opens packages for a target."""
    ours = {name: module for name, module in engines.items() if not _is_vendors(module)}
    found = next((name for name, module in ours.items() if target == module.TARGET), None)
    if found is None:
        raise UnsupportedError(f"no engine here opens packages for {target}; there are {', '.join(engines)}")
    return found
