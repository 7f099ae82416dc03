"""The safetensors files of a model folder, and which tensor is in which: one file, or the shards of an index."""

from __future__ import annotations

from pathlib import Path

from roundexport.errors import CheckpointError
from roundexport.storage.paths import is_plain_name, safe_join
from roundexport.storage.safetensors_reader import TensorFile
from roundexport.storage.strict_json import parse

from .hub import PICKLES

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files, single or as the index has them."""
    if safe_join(folder, WEIGHTS).is_file():
        return [WEIGHTS]
    shards = sorted(set(_weight_map(folder).values()))
    for name in shards:
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX}: the weight file {name!r} is refused; it must lie in the folder")
    missing = [name for name in shards if not safe_join(folder, name).is_file()]
    if missing:
        count = f"{len(missing)} of {len(shards)}"
        raise CheckpointError(f"{folder}: {count} weight files are missing, the first is {missing[0]}; fetch it again")
    if shards:
        return shards
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder}: the weights are a pickle ({pickles[0]}), which can run code and is never read; if you trust it "
            "convert it, once, with transformers: AutoModel….from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise CheckpointError(f"{folder} holds no weights: neither {WEIGHTS} nor {INDEX}")


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> file of the index; empty without one."""
    path = safe_join(folder, INDEX)
    if not path.is_file():
        return {}
    weight_map = parse(_read(path), str(path)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map must map every tensor to a file")
    return weight_map


def stored_tensors(folder: Path, files: dict[str, TensorFile]) -> dict[str, str]:
    """Tensor -> file, after holding the files against the index."""
    stored: dict[str, str] = {}
    for name, file in files.items():
        for tensor in file.names:
            if tensor in stored:
                raise CheckpointError(f"{folder}: {tensor} is in {stored[tensor]} and in {name}")
            stored[tensor] = name
    if WEIGHTS not in files:
        for tensor, name in _weight_map(folder).items():
            if stored.get(tensor) != name:
                raise CheckpointError(f"{folder / INDEX}: {tensor} should be in {name} but is not")
    return stored


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
