"""Checkpoints that Olive's own pass writes of a model, in its own environment.

    olive_side.py MODEL OUT [NAME…]

Rounding to nearest, which needs no data: what is proved is that integers arrive.
"""

import sys
from pathlib import Path
from typing import Any

from cases import make, source
from olive.model import HfModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.pytorch.rtn import Rtn

CASES: dict[str, dict[str, Any]] = {
    "olive-w4g32-asym": {"bits": 4, "group_size": 32, "sym": False},
    "olive-w4g64-sym": {"bits": 4, "group_size": 64, "sym": True},
    "olive-w8row-sym": {"bits": 8, "group_size": -1, "sym": True},
    "olive-w2g32-asym": {"bits": 2, "group_size": 32, "sym": False},
    "olive-mixed": {"bits": 4, "group_size": 32, "sym": False,
                    "overrides": {"model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 64}}},
    "olive-embeds-w4g32-asym": {"bits": 4, "group_size": 32, "sym": False, "embeds": True},
    "olive-lm_head-w4g32-asym": {"bits": 4, "group_size": 32, "sym": False, "lm_head": True},
}  # fmt: skip


def main(model: str, out: Path, names: list[str]) -> int:
    """Make every case that is asked for, all by default; returns how many failed."""

    def one(name: str, settings: dict[str, Any], folder: Path) -> None:
        with source(model, "lm_head" in settings) as given:
            rounding = create_pass_from_dict(Rtn, settings, disable_search=True)
            rounding.run(HfModelHandler(model_path=given), str(folder))

    return make(CASES, one, model, out, names, "group_size")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]) > 0)
