"""What a verification holds of its weights at once: moments for `MemoryLimit.check`, also for who foretells one.

    opening      the package, twice, or sections of a decoder's (runtime/sections.py)
    comparing    what is open of it, and beside it the float model: of a decoder that is given its text the largest
                 weight, a block, hidden states and logits; else all of it

In: the package's bytes and the float model's.  Out: bytes by name.  Source: float_model.py, sectioned.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from roundexport.model.weight_bytes import WeightBytes
from roundexport.targets.memory_need import Moment, opening


@dataclass(frozen=True)
class Windows:
    """Text that a decoder is given.

    Args:
        count: windows.
        length: tokens of each.
        width: of hidden states.
        vocabulary: logits of a token.
    """

    count: int
    length: int
    width: int
    vocabulary: int

    def held(self) -> float:
        """Bytes of what the float model says of them."""
        tokens = self.count * self.length
        return 4 * tokens * self.width + 8 * min(tokens, self.length) * self.vocabulary


def verify_moments(package: float, weights: WeightBytes, windows: Windows | None, sections: bool) -> tuple[Moment, ...]:
    """Of a verification.

    Args:
        package: its bytes.
        weights: of the float model.
        windows: what a decoder is given; None: it writes its text itself, or is none.
        sections: the package can be run section by section.
    """
    opened = opening(package, weights, sections)
    held = opened if sections else {"the package": package}
    beside: Moment = {"the float model": weights.whole}
    if windows is not None:
        beside = {
            "the float model's largest weight": weights.largest,
            "a block of it": weights.block,
            "hidden states and logits": windows.held(),
        }
    return opened, {**held, **beside}
