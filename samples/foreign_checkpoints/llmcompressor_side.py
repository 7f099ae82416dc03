"""Checkpoints that llm-compressor writes of a model, in its own environment.

    llmcompressor_side.py MODEL OUT

Rounding to nearest, which needs no data: what is proved is that integers arrive.
"""

import sys
from pathlib import Path
from typing import Any

from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier

CASES: dict[str, dict[str, Any]] = {
    "ct-by-llmcompressor-w4a16": {"scheme": "W4A16"},
    "ct-by-llmcompressor-w4a16-asym": {"scheme": "W4A16_ASYM"},
    "ct-by-llmcompressor-w8a16": {"scheme": "W8A16"},
    "ct-by-llmcompressor-w8a8": {"scheme": "W8A8"},
}


def main(model: str, out: Path) -> None:
    """Make every case that is not there; one that fails is told and left out."""
    for name, settings in CASES.items():
        if (out / name).is_dir():
            continue
        try:
            recipe = QuantizationModifier(targets="Linear", ignore=["lm_head"], **settings)
            oneshot(model=model, recipe=recipe, output_dir=str(out / f"{name}.partial"), precision="bfloat16")
            (out / f"{name}.partial").rename(out / name)
            print(f"made {name}", flush=True)
        except Exception as error:
            print(f"FAILED {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
