"""Opening a package: its files are checked, then its engine is imported, and only that one.

An engine is a file ``engine_<name>.py`` here with ``TARGET`` (the packages it opens), ``LIBRARY`` (what it imports) and
``open(folder, manifest, options)``.  ``auto`` takes the engine of the package's target.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import cast

from roundexport import discovery
from roundexport.errors import UnsupportedError, UsageError
from roundexport.package import PackageManifest, read_package

from .embedding import Encoder
from .generation import Decoder
from .types import DecoderBackend, EncoderBackend, EngineOptions

ENGINES = {"onnx": "ort", "openvino": "ov"}
"""Engine that ``auto`` takes, by target."""

_LIBRARIES = {"ort": ("onnxruntime", "onnx"), "ov": ("openvino", "openvino")}  # engine -> module, extra to install


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
        engine: ``auto`` (the engine of the package's target), ``ort`` or ``ov``.
        device: ``CPU``, or one that the engine lists (OpenVINO: ``GPU``).
        threads: worker threads; None leaves the choice to the engine.
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
    options = EngineOptions(device, threads, precise)
    manifest = read_package(folder, check_hashes)
    backend = _open(folder, manifest, engine, options)
    if manifest.task == "generate":
        return Decoder(cast(DecoderBackend, backend), manifest, folder)
    return Encoder(cast(EncoderBackend, backend), manifest, folder)


def _open(
    folder: Path, manifest: PackageManifest, engine: str, options: EngineOptions
) -> DecoderBackend | EncoderBackend:
    name = ENGINES[manifest.target] if engine == "auto" else engine
    if name in _LIBRARIES:
        library, extra = _LIBRARIES[name]
        if importlib.util.find_spec(library) is None:
            raise UnsupportedError(
                f"{folder}: a package for {manifest.target} needs {library}, which is not installed; "
                f"pip install 'roundexport[{extra}]'"
            )
    module = discovery.load("engines", name)
    if manifest.target != module.TARGET:
        raise UsageError(
            f"{folder}: engine {name!r} opens packages for {module.TARGET}, this one is for {manifest.target}; "
            f"use engine {ENGINES[manifest.target]!r} or auto"
        )
    return cast("DecoderBackend | EncoderBackend", module.open(folder, manifest, options))
