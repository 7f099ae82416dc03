"""Hold imported checkpoints and GGUF files against what their owners' own code makes of them.

    compare.py FOLDER…

Each FOLDER has, beside its weights, `owner.safetensors`: `<layer>.weight`, the matrix that the owner's loader computes
with, in float32 from the file's scales, and `<layer>.integers`, code - zero_point by the same loader (owners.py writes
them in the owner's environment; gguf_side.py the matrices by the names in the file, with llama.cpp's order of rotary
rows).  A folder of GPTQ's layout is opened a second time with checkpoint_format turned to the other convention, which
must be refused.  What a GGUF file holds as floats must be the owner's matrices, too.

Prints a row per folder; the exit code is 1 where a bit differs, and where a folder is refused that should not be, or
the other way round.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
from safetensors.numpy import load_file

from roundexport import import_checkpoint
from roundexport.conversion.importing import imported_layers
from roundexport.errors import CheckpointError, RoundexportError, UnsupportedError
from roundexport.formats.artifact import Artifact
from roundexport.model.checkpoint import Checkpoint
from roundexport.quant.quantized_linear import QuantizedLinear

TO_REFUSE = "act-order"  # in a folder's name: groups scattered over the inputs, which no runtime multiplies
INTEGERS = ("Q4_0", "Q5_0", "Q8_0", "Q6_K")  # of GGUF's types those that are imported
GENERATIONS = ("gptq", "gptq_v2")  # checkpoint_format


@dataclass(frozen=True)
class Row:
    """What was found of a folder.

    Args:
        told: for the table.
        right: whether all is as it must be.
    """

    told: str
    right: bool


def compare(folder: Path) -> Row:
    """A row of the table."""
    try:
        return of_gguf(folder) if (folder / "model.gguf").is_file() else of_folder(folder)
    except UnsupportedError as error:
        return Row(f"REFUSED {error}", TO_REFUSE in folder.name)
    except (RoundexportError, OSError, KeyError) as error:
        return Row(f"FAILED {type(error).__name__}: {error}", False)


def of_folder(folder: Path) -> Row:
    """Integers and matrices of a folder's layers."""
    checkpoint, owner = Checkpoint.open(folder), load_file(folder / "owner.safetensors")
    layers = {info.name: spec for info, spec in imported_layers(checkpoint)}
    equal = 0
    for name in layers:
        linear = checkpoint.quantized(name)
        assert linear is not None
        found = linear.dequantize()
        equal += (
            np.array_equal(differences(linear), owner.get(f"{name}.integers"))
            and np.array_equal(found, owner.get(f"{name}.weight"))
            and np.array_equal(found, checkpoint.float32(f"{name}.weight"))
        )
    missing = {name.rpartition(".")[0] for name in owner} - set(layers)
    told = f"{schemes(spec.describe() for spec in layers.values())} | {equal} of {len(layers)} layers: integers and "
    told += f"weights bit for bit the owner's{of_missing(missing)}"
    mixed_up = other_generation(folder)
    told += {None: "", True: " | refused as the other GPTQ", False: " | THE OTHER GPTQ IS NOT SEEN"}[mixed_up]
    right = equal == len(layers) > 0 and not missing and mixed_up is not False and TO_REFUSE not in folder.name
    return Row(told, right)


def differences(linear: QuantizedLinear) -> np.ndarray:
    """Code - zero point of every weight."""
    zeros = linear.full_zero_points().astype(np.int16)
    return linear.unpack().astype(np.int16) - np.repeat(zeros, linear.in_features // linear.groups, axis=1)


def other_generation(folder: Path) -> bool | None:
    """Whether a GPTQ folder is refused once its config names the other convention; None: no GPTQ, or no way to tell."""
    config = json.loads((folder / "config.json").read_text())
    own = config["quantization_config"]
    if own["quant_method"] != "gptq" or (own["bits"] == 8 and not own["sym"]):
        return None
    other = GENERATIONS[own.get("checkpoint_format", GENERATIONS[0]) == GENERATIONS[0]]
    with TemporaryDirectory(dir=folder.parent) as apart:
        for path in folder.glob("*.*"):
            if path.is_file() and path.name != "config.json":
                (Path(apart) / path.name).hardlink_to(path)
        changed = {**config, "quantization_config": {**own, "checkpoint_format": other}}
        (Path(apart) / "config.json").write_text(json.dumps(changed))
        try:
            Checkpoint.open(apart)
        except CheckpointError as error:
            return "Correct checkpoint_format" in str(error)
        return False


def of_gguf(folder: Path) -> Row:
    """The same of a GGUF file of Llama's architecture, by the file's names and in its order of rows."""
    file, owner = folder / "model.gguf", load_file(folder / "owner.safetensors")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    checkpoint = Checkpoint.open(str(file))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, checkpoint.config["num_hidden_layers"])
    integers, equal = 0, 0
    with imported(file) as artifact:
        taken = () if artifact is None else artifact.names()
        wrong = 0
        for name in (name.removesuffix(".weight") for name in checkpoint.owned()):
            own = names.get_name(name)
            if f"{own}.weight" not in owner:
                continue
            values = checkpoint.float32(f"{name}.weight")
            if name in taken:
                assert artifact is not None
                integers += 1
                values = artifact.linear(name).dequantize()
            wrong += (name in taken) != (kinds[f"{own}.weight"] in INTEGERS)
            heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(own.rpartition(".")[2])
            values = values if heads is None else paired(values, checkpoint.config[heads])
            equal += np.array_equal(values, owner[f"{own}.weight"])
    told = f"{schemes(kinds[name] for name in owner)} | {equal} of {len(owner)} weights bit for bit the owner's, "
    told += f"{integers} of them integers" if integers else "none of them integers: refused by import"
    return Row(told + (f" | {wrong} TAKEN OTHERWISE THAN BY TYPE" if wrong else ""), equal == len(owner) and not wrong)


@contextmanager
def imported(file: Path) -> Iterator[Artifact | None]:
    """The artifact that import makes of a file; None where there is nothing to import."""
    with TemporaryDirectory() as apart:
        try:
            made = import_checkpoint(file, Path(apart) / "artifact", progress=False)
        except UnsupportedError:
            made = None
        yield None if made is None else Artifact.open(made)


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection from transformers' order (halves of a head) to llama.cpp's (pairs)."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def schemes(of_layers: Iterator[str]) -> str:
    """Each once."""
    return ", ".join(sorted(set(of_layers)))


def of_missing(names: set[str]) -> str:
    """Layers that the owner has and import has not."""
    return f" | NOT IMPORTED: {', '.join(sorted(names))}" if names else ""


def main(folders: list[str]) -> int:
    """Print the table."""
    right = bool(folders)
    for folder in map(Path, folders):
        row = compare(folder)
        right &= row.right
        print(f"{folder.name:36} | {row.told}", flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
