"""What the tests of importers share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from foreign_checkpoints import Grid

from roundexport.importers._opening import Opened

Open = Callable[..., Opened]


def assert_arrived(found: Opened, name: str, grid: Grid) -> None:
    linear = found.layers[f"{name}.weight"].read()
    shift = (1 << (linear.spec.bits - 1)) - (1 << (grid.bits - 1)) if linear.spec.symmetric else 0
    repeats = linear.groups // grid.scales.shape[1]
    assert np.array_equal(linear.unpack().astype(int) - shift, grid.codes)
    assert np.array_equal(linear.full_zero_points().astype(int) - shift, np.repeat(grid.zeros, repeats, 1))
    assert np.array_equal(linear.scales, np.repeat(grid.scales, repeats, 1))
    assert linear.scales.dtype == grid.scales.dtype
    assert np.array_equal(linear.dequantize(), grid.weight())
