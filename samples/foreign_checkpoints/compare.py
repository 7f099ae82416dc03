"""Hold imported checkpoints and GGUF files against what their owners' own code makes of them.

    compare.py FOLDER…

Each FOLDER has, beside its weights, `owner.safetensors`: `<layer>.weight`, the matrix that the owner's loader computes
with, in float32 from the file's scales (owners.py writes it in the owner's environment; gguf_side.py by the names in
the file, with llama.cpp's order of rotary rows).  Prints a row per folder; the
exit code is 1 where a bit differs, and where a folder is refused that should not be, or the other way round.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
from safetensors.numpy import load_file

from roundexport import import_checkpoint
from roundexport.conversion.importing import imported_layers
from roundexport.errors import RoundexportError
from roundexport.formats.artifact import Artifact
from roundexport.model.checkpoint import Checkpoint

Weights = dict[str, np.ndarray]

TO_REFUSE = "act-order"  # in a folder's name: groups scattered over the inputs, which no runtime multiplies


def compare(folder: Path) -> tuple[str, bool]:
    """A row of the table, and whether all is equal."""
    try:
        weights, schemes = of_gguf(folder) if (folder / "model.gguf").is_file() else of_folder(folder)
    except RoundexportError as error:
        return f"REFUSED {error}", TO_REFUSE in folder.name
    if TO_REFUSE in folder.name:
        return "NOT REFUSED", False
    owner = load_file(folder / "owner.safetensors") if (folder / "owner.safetensors").is_file() else {}
    equal = [name for name, values in weights.items() if np.array_equal(values, owner.get(f"{name}.weight"))]
    missing = sorted({name.removesuffix(".weight") for name in owner} - set(weights))
    found = f"{len(equal)} of {len(weights)} layers bit for bit the owner's"
    told = f"{', '.join(sorted(schemes))} | {found}{f' | not imported: {missing}' if missing else ''}"
    return told, len(equal) == len(weights) > 0


def of_folder(folder: Path) -> tuple[Weights, set[str]]:
    """What a folder's layers become, dequantized, and their schemes."""
    checkpoint = Checkpoint.open(folder)
    layers = imported_layers(checkpoint)
    weights = {info.name: checkpoint.float32(f"{info.name}.weight") for info, _ in layers}
    return weights, {spec.describe() for _, spec in layers}


def of_gguf(folder: Path) -> tuple[Weights, set[str]]:
    """The same of a GGUF file of Llama's architecture, by the file's names and in its order of rows."""
    with TemporaryDirectory() as apart:
        artifact = Artifact.open(import_checkpoint(folder / "model.gguf", Path(apart) / "artifact", progress=False))
        config = Checkpoint.open(str(folder / "model.gguf")).config
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
        weights = {}
        for name in artifact.names():
            values, own = artifact.linear(name).dequantize(), names.get_name(name)
            heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(own.rpartition(".")[2])
            weights[own] = values if heads is None else paired(values, config[heads])
        return weights, {artifact.entry(name).spec.describe() for name in artifact.names()}


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection from transformers' order (halves of a head) to llama.cpp's (pairs)."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def main(folders: list[str]) -> int:
    """Print the table."""
    rows = [(Path(folder).name, *compare(Path(folder))) for folder in folders]
    for name, row, _ in rows:
        print(f"{name:36} | {row}")
    return 0 if rows and all(equal for _, _, equal in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
