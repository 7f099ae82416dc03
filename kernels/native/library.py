"""Where the built library is: ``$ROUNDEXPORT_KERNELS``, or the user's cache folder under the hash of what makes it.

The hash is part of the name, so that another version of roundexport does not take a library that it did not build, of
other sources or with other flags.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
from pathlib import Path

from roundexport.errors import UnsupportedError

DOMAIN, OPERATOR = "roundexport.kernels", "GroupMatMul"
FOLDER = Path(__file__).parent
COMMAND = "python -m roundexport.kernels.native.build"
IN_PACKAGE = "roundexport_kernels.so"
"""Name of a copy in a package's folder, where onnxruntime-genai looks for it; no package is written with one."""
_PLACE, _FORCED = "ROUNDEXPORT_KERNELS", "ROUNDEXPORT_ISA"


def sources() -> list[Path]:
    """Every file that decides what the library is: its sources, and the one with the compiler's flags."""
    return sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h"), FOLDER / "build.py"])


@functools.cache
def default_path() -> Path:
    """Where `build` puts the library unless told otherwise."""
    digest = hashlib.sha256(platform.machine().encode())
    for path in sources():
        digest.update(path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "roundexport" / f"kernels-{digest.hexdigest()[:16]}.so"


def built() -> Path:
    """The built library.

    Raises:
        UnsupportedError: it has not been built, or is not where the environment says.
    """
    told = os.environ.get(_PLACE)
    path = Path(told) if told else default_path()
    if not path.is_file():
        where = f"{_PLACE} is {told}, where no file is" if told else "it has not been built on this machine"
        raise UnsupportedError(f"roundexport's own product is not there: {where}; run: {COMMAND}")
    return path


def opened(path: Path) -> ctypes.CDLL:
    """The built library, loaded.

    Raises:
        UnsupportedError: what is there cannot be loaded.
    """
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise UnsupportedError(f"{error}: no library that this machine loads; run: {COMMAND}") from error


def instruction_set() -> str:
    """The instruction set that products run with here.

    Raises:
        UnsupportedError: see `built` and `opened`; or the environment forces one that the processor or the build lacks.
    """
    name = opened(built()).roundexport_isa
    name.restype = ctypes.c_char_p
    found, forced = bytes(name()).decode(), os.environ.get(_FORCED)
    if forced and forced != found:
        raise UnsupportedError(f"{_FORCED} is {forced}, which this processor or this build of the product lacks")
    return found
