"""Saving a model so that a full disk is told as one: OpenVINO only says "iostream error"."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import openvino as ov

from roundexport.errors import RoundexportError

_FULL = 1 << 20  # bytes; a disk with less than this left stopped the write


def save(model: ov.Model, path: Path) -> None:
    """Write ``path`` (.xml) and its .bin; constants keep their types.

    Raises:
        OSError: ENOSPC, which atomic.write_folder reports with what to do.
        RoundexportError: OpenVINO could not write for another reason.
    """
    try:
        ov.save_model(model, path, compress_to_fp16=False)
    except RuntimeError as error:
        if shutil.disk_usage(path.parent).free < _FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise RoundexportError(f"{path}: OpenVINO could not write it: {str(error).strip().splitlines()[0]}") from error
