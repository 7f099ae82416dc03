"""Build the library: ``python -m roundexport.kernels.native.build [PATH | PACKAGE]``.

PATH is where it is to be written, a file that ends in .so, .dylib or .dll.  Into a folder, a PACKAGE, comes a copy of
the one that this machine has, for clients that look for it there, as onnxruntime-genai does.

The compiler is ``$CXX``, a command with or without words behind it, or c++, g++ or clang++, of C++17; nothing else is
needed, and some five seconds.  One command per source, as each instruction set has flags of its own; the processor is
asked at run time, so that one library serves every machine of one architecture.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from roundexport.errors import RoundexportError, UnsupportedError, UsageError

from .library import COMMAND, FOLDER, IN_PACKAGE, built, default_path, instruction_set

_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Wno-maybe-uninitialized")  # gcc 12 on its own intrinsics
_OF_SOURCE = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mavx2", "-mfma", "-mf16c"),
}
_ENDINGS = (".so", ".dylib", ".dll")


def compiler() -> list[str] | None:
    """The command that `build` would take for the compiler; None: there is none."""
    named = shlex.split(os.environ.get("CXX", ""), posix=os.name != "nt")
    found = (path for name in ("c++", "g++", "clang++") if (path := shutil.which(name)))
    return named or next(([path] for path in found), None)


def build(path: Path | None = None) -> Path:
    """Compile and link the library; what is at ``path`` is replaced when all went well.

    Args:
        path: of the library; None: where `built` looks for it.

    Returns:
        The path.

    Raises:
        UsageError: a path that is no library's.
        UnsupportedError: there is no compiler.
        RoundexportError: the compiler failed, or cannot be run.
    """
    if path is not None and path.suffix not in _ENDINGS:
        raise UsageError(f"{path}: no such package, and a library's file ends in {', '.join(_ENDINGS)}")
    tool, path = compiler(), path or default_path()
    if tool is None:
        raise UnsupportedError("building the product takes a C++ compiler: install g++ or clang++, or set CXX")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = []
        for source in sorted(FOLDER.glob("*.cpp")):
            objects.append(str(Path(folder, f"{source.stem}.o")))
            own = _OF_SOURCE.get(source.stem, ()) if x86 else ()
            _run([*tool, *_FLAGS, *own, "-c", str(source), "-o", objects[-1]])
        made = Path(folder, path.name)
        _run([*tool, "-shared", *objects, "-o", str(made)])
        made.replace(path)
    return path


def put_into(package: Path) -> Path:
    """Copy the library into a package's folder; it is built first where this machine has none.

    Raises:
        UnsupportedError: there is none, and no compiler.
        RoundexportError: the compiler failed.
    """
    try:
        library = built()
    except UnsupportedError:
        library = build()
    with tempfile.TemporaryDirectory(dir=package) as folder:
        made = Path(folder, IN_PACKAGE)
        shutil.copyfile(library, made)
        return made.replace(package / IN_PACKAGE)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RoundexportError(f"{command[0]} cannot be run: {error.strerror}; set CXX to a C++ compiler") from error
    if done.returncode:
        raise RoundexportError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="Build roundexport's own product for ONNX packages that were exported with --kernels."
    )
    parser.add_argument(
        "path", nargs="?", type=Path, metavar="PATH | PACKAGE",
        help="file to write the library to, or a package's folder to put a copy into; default: the user's cache folder",
    )  # fmt: skip
    given = parser.parse_args().path
    try:
        path = put_into(given) if given is not None and given.is_dir() else build(given)
        os.environ["ROUNDEXPORT_KERNELS"] = str(path)
        print(f"{path} ({instruction_set()})")
    except (RoundexportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
