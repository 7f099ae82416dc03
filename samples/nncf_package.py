"""What NNCF makes of a float OpenVINO package: nncf_package.py FLOAT_PACKAGE OUT [GROUP_SIZE] [TEXT].

The float package is the same capture of the same model, so nothing but the rounding differs.  Without TEXT: data-free,
as `nncf.compress_weights` comes.  With TEXT: AWQ, scale estimation and GPTQ on 64 samples of 256 tokens.
Embeddings and lm_head go to 8 bits, which is NNCF's default and ours.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import nncf
import numpy as np
import openvino as ov
from tokenizers import Tokenizer

from roundexport.formats.package import read_package, write_manifest
from roundexport.storage.atomic import write_folder


def samples(package: Path, text: Path, count: int = 64, length: int = 256) -> nncf.Dataset:
    ids = Tokenizer.from_file(str(package / "tokenizer.json")).encode(text.read_text(encoding="utf-8")).ids
    windows = np.array(ids[: count * length], np.int64).reshape(count, 1, length)
    return nncf.Dataset(
        [
            {
                "input_ids": window,
                "attention_mask": np.ones_like(window),
                "position_ids": np.arange(length, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
            for window in windows
        ]
    )


def compress(package: Path, out: Path, group_size: int = 128, text: Path | None = None) -> None:
    model = ov.Core().read_model(package / "openvino_model.xml")
    aware = (
        {} if text is None else {"dataset": samples(package, text), "awq": True, "scale_estimation": True, "gptq": True}
    )
    small = nncf.compress_weights(
        model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=group_size, ratio=1.0, **aware
    )
    manifest = read_package(package, check_hashes=False)
    with write_folder(out) as folder:
        for name in manifest.files:
            shutil.copyfile(package / name, folder / name)
        ov.save_model(small, folder / "openvino_model.xml", compress_to_fp16=False)
        write_manifest(folder, replace(manifest, kept_float=(), files={}))


if __name__ == "__main__":
    compress(
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        int(sys.argv[3]) if len(sys.argv) > 3 else 128,
        Path(sys.argv[4]) if len(sys.argv) > 4 else None,
    )
