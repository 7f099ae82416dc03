"""Hold imported checkpoints against what their owners' own code makes of them.

    compare.py FOLDER…

Each FOLDER has, beside its weights, `owner.safetensors`: `<layer>.weight`, the matrix that the owner's loader computes
with, in float32 from the file's scales (owners.py writes it in the owner's environment).  Prints a row per folder; the
exit code is 1 where a bit differs.
"""

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from roundexport.conversion.importing import imported_layers
from roundexport.errors import RoundexportError
from roundexport.model.checkpoint import Checkpoint


def compare(folder: Path) -> tuple[str, bool]:
    """A row of the table, and whether all is equal."""
    try:
        checkpoint = Checkpoint.open(folder)
        layers = imported_layers(checkpoint)
    except RoundexportError as error:
        return f"REFUSED {error}", False
    owner = load_file(folder / "owner.safetensors") if (folder / "owner.safetensors").is_file() else {}
    weights = {info.name: checkpoint.float32(f"{info.name}.weight") for info, _ in layers}
    equal = [name for name, values in weights.items() if np.array_equal(values, owner.get(f"{name}.weight"))]
    schemes = ", ".join(sorted({spec.describe() for _, spec in layers}))
    missing = sorted({name.removesuffix(".weight") for name in owner} - set(weights))
    found = f"{len(equal)} of {len(layers)} layers bit for bit the owner's"
    return f"{schemes} | {found}{f' | not imported: {missing}' if missing else ''}", len(equal) == len(weights) > 0


def main(folders: list[str]) -> int:
    """Print the table."""
    rows = [(Path(folder).name, *compare(Path(folder))) for folder in folders]
    for name, row, _ in rows:
        print(f"{name:36} | {row}")
    return 0 if all(equal for _, _, equal in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
