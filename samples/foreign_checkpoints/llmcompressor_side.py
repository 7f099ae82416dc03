"""Checkpoints that llm-compressor writes of a model, in its own environment.

    llmcompressor_side.py MODEL OUT [NAME…]

Rounding to nearest, which needs no data: what is proved is that integers arrive.
"""

import sys
from pathlib import Path
from typing import Any

from cases import make
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier

CASES: dict[str, dict[str, Any]] = {
    "ct-by-llmcompressor-w4g64-sym": {"bits": 4, "group": 64, "symmetric": True},
    "ct-by-llmcompressor-w4g64-asym": {"bits": 4, "group": 64, "symmetric": False},
    "ct-by-llmcompressor-w8g64-sym": {"bits": 8, "group": 64, "symmetric": True},
    "ct-by-llmcompressor-w8row-asym": {"bits": 8, "group": -1, "symmetric": False},
    "ct-by-llmcompressor-w4a16": {"scheme": "W4A16", "group": 128},
    "ct-by-llmcompressor-w4a16-asym": {"scheme": "W4A16_ASYM", "group": 128},
    "ct-by-llmcompressor-w8a16": {"scheme": "W8A16"},
    "ct-by-llmcompressor-w8a8": {"scheme": "W8A8"},
}


def scheme(settings: dict[str, Any]) -> dict[str, Any]:
    """A preset by name, or groups of another size, or whole rows (-1)."""
    if "scheme" in settings:
        return {"scheme": settings["scheme"], "targets": "Linear"}
    grid = (
        {"strategy": "channel"} if settings["group"] == -1 else {"strategy": "group", "group_size": settings["group"]}
    )
    weights = {"num_bits": settings["bits"], "type": "int", "symmetric": settings["symmetric"], **grid}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def main(model: str, out: Path, names: list[str]) -> int:
    """Make every case that is asked for, all by default; returns how many failed."""

    def one(name: str, settings: dict[str, Any], folder: Path) -> None:
        recipe = QuantizationModifier(ignore=["lm_head"], **scheme(settings))
        oneshot(model=model, recipe=recipe, output_dir=str(folder), precision="bfloat16")

    return make(CASES, one, model, out, names, "group")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]) > 0)
