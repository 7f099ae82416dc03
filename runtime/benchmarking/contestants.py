"""Who takes part in a benchmark: packages in their engines, and rivals that need no package.

    onnx in ort, onnxruntime-genai                                    worker.py
    openvino in ov, openvino-genai, openvino-genai-batching           worker.py
    a GGUF file in llama.cpp                                          llama_cpp_worker.py
    the float model in torch, torch-bfloat16                          roundexport/contestants/torch_worker.py

Every one is a command that speaks the protocol of worker.py, so nothing of theirs is imported here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roundexport.errors import UsageError
from roundexport.formats.package import read_package
from roundexport.runtime.loading import installed, is_vendors_loop, opens

_TORCH = {"torch": "float32", "torch-bfloat16": "bfloat16"}
_LLAMA = "llama.cpp"
RIVALS = (*_TORCH, _LLAMA)
"""Engines that open no package."""


@dataclass(frozen=True)
class Contestant:
    """Something to time: a command that speaks the protocol of worker.py.

    Args:
        name: what the report calls it.
        command: program and arguments.
        files: files and folders that it is read from; a cold start takes them from the disk.
        profiles: whether it answers ``profile``.
    """

    name: str
    command: tuple[str, ...]
    files: tuple[Path, ...] = ()
    profiles: bool = False


@dataclass(frozen=True)
class Rivals:
    """What rivals are read from.

    Args:
        model: the float model, for ``torch``; None: where the first package says that it came from.
        gguf: the file for ``llama.cpp``.
    """

    model: str | Path | None = None
    gguf: str | Path | None = None


def package_contestant(package: str | Path, name: str | None = None, **options: Any) -> Contestant:
    """A package as a contestant; ``options`` are the parameters of `load`."""
    arguments = json.dumps({"package": str(package), **options})
    command = _module(f"{__package__}.worker", arguments)
    profiles = not is_vendors_loop(str(options.get("engine", "auto")))
    return Contestant(name or Path(package).name, command, (Path(package),), profiles)


def torch_contestant(model: str | Path, name: str = "torch", *, threads: int, dtype: str = "float32") -> Contestant:
    """The float model (folder, hub id or GGUF file) in transformers; needs ``roundexport[tune]``."""
    files = (Path(model),) if Path(model).exists() else ()
    return Contestant(name, _module("roundexport.contestants.torch_worker", str(model), str(threads), dtype), files)


def llama_cpp_contestant(gguf: str | Path, name: str = _LLAMA, *, threads: int) -> Contestant:
    """A GGUF file in llama.cpp, through llama-cpp-python or the tool llama-bench."""
    return Contestant(name, _module(f"{__package__}.llama_cpp_worker", str(gguf), str(threads)), (Path(gguf),))


def named_contestants(
    given: Sequence[str | Path | Contestant], engine: str | None, rivals: Rivals, options: dict[str, Any]
) -> list[Contestant]:
    """Everything that takes part, under names that differ.

    Args:
        given: packages, and contestants as they are.
        engine: names, comma-separated; None: each package as `load` opens it; ``auto`` alone: in every engine that is
            installed.
        rivals: what rivals are read from.
        options: parameters of `load`.

    Raises:
        UsageError: nothing takes part, an engine opens no package, a rival lacks its model, or names are the same.
    """
    engines = ["auto"] if engine is None else engine.split(",")
    everything = engines == ["auto"] and engine is not None
    own = [name for name in engines if name not in RIVALS]
    packages = [item for item in given if not isinstance(item, Contestant)]
    unique = len({Path(item).name for item in packages}) == len(packages)
    found = []
    for item in given:
        if isinstance(item, Contestant):
            found.append(item)
            continue
        name = Path(item).name if unique else str(item)
        chosen = (
            installed(item) if everything else [engine for engine in own if engine == "auto" or opens(engine, item)]
        )
        if not chosen:
            raise UsageError(f"{item}: none of the engines {', '.join(engines)} opens this package")
        for one in chosen:
            label = name if len(own) == 1 and not everything else f"{name} · {one.replace('_', '-')}"
            found.append(package_contestant(item, label, engine=one, **options))
    found += [_rival(name, packages, rivals, options["threads"]) for name in engines if name in RIVALS]
    if not found:
        raise UsageError("nothing to time: give at least one package")
    if len({contestant.name for contestant in found}) < len(found):
        raise UsageError(f"contestants need different names, got {[contestant.name for contestant in found]}")
    return found


def _rival(name: str, packages: Sequence[str | Path], rivals: Rivals, threads: int) -> Contestant:
    if name == _LLAMA:
        if rivals.gguf is None:
            raise UsageError("engine llama.cpp needs a GGUF file: give --gguf FILE")
        return llama_cpp_contestant(rivals.gguf, threads=threads)
    model = rivals.model
    if model is None and packages:
        model = read_package(Path(packages[0]), check_hashes=False).source["location"]
    if model is None:
        raise UsageError(f"engine {name} needs the float model: give --model MODEL")
    return torch_contestant(model, name, threads=threads, dtype=_TORCH[name])


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    # -P keeps the current folder off the path: a folder called runtime or kernels there must not be found.
    return (sys.executable, "-P", "-m", name, *arguments)
