"""What an export holds of its weights at once: moments for `MemoryLimit.check`, also for who foretells an export.

    writing      the largest weight, as it is read, turned and packed
    comparing    the largest weight and a block, as float32; then the package, twice while its runtime opens it, or
                 sections of it where it can be run so (runtime/sections.py)

In: the package's bytes and the float model's.  Out: bytes by name.  Source: output_check.py, dequantized_model.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from roundexport.model.weight_bytes import WeightBytes
from roundexport.types import PAIRS, Task

from .output_check import OPENED

Moment = Mapping[str, float]


def export_moments(package: float, weights: WeightBytes, task: Task, embeds: bool) -> tuple[Moment, ...]:
    """Of an export whose outputs are compared.

    Args:
        package: its bytes.
        weights: of the float model.
        task: what the model is for.
        embeds: its graphs read vectors.
    """
    reference = {"the largest weight and a block, as float32": weights.largest + weights.step}
    if task in PAIRS:
        reference = {"the model, as float32": weights.whole}
    return opening(package, weights, sections=task not in PAIRS and not embeds), reference, writing(weights)


def opening(package: float, weights: WeightBytes, sections: bool) -> Moment:
    """Of a package while its runtime opens it.

    Args:
        package: its bytes.
        weights: of the float model.
        sections: it can be run section by section.
    """
    if sections:
        return {"sections of the package, while its runtime opens them": min(OPENED * package, weights.largest)}
    return {"the package, twice while its runtime opens it": OPENED * package}


def writing(weights: WeightBytes) -> Moment:
    """Of an export while it writes."""
    return {"the largest weight, as it is read, turned and packed": 2 * weights.largest}
