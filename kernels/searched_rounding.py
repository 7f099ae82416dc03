"""Rounding to nearest on a searched grid, optionally with scales that keep the size of the outputs.

    s, z of every group = the grid of least Σ_j h_j·(ŵ_j - w_j)²           (grid_search.py)
    code = clamp(round(w / s) + z, 0, 2**bits - 1)
    s ← s·Σ h_j·w_j² / Σ h_j·w_j·ŵ_j                                       where ``keep_size``; the codes stay

The grid of least error shrinks weights; algorithms/rounding/optimal_rtn.py explains why, and what it costs a model.
`reference` searches with numpy sums and does not stretch.

In: a weight [N, K] and the importance h of its columns, [K] or [N, K].  Out: codes, scales, zero points.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from roundexport.kernels import fake_quant, grid_search, stored_scales
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

if TYPE_CHECKING:
    from torch import Tensor


def available() -> str | None:
    """None when torch is there, which `run` needs; else the reason."""
    return fake_quant.available()


def reference(weight: NDArray[np.float32], spec: QuantSpec, importance: NDArray[np.float32]) -> QuantizedLinear:
    """:func:`run` with ``keep_size`` False, with the search's sums and the rounding in numpy."""
    scale, zero = grid_search.reference(weight, spec, importance)
    groups = weight.reshape(*scale.shape, -1)
    centered_codes = np.clip(np.rint(groups / scale[..., None]), -zero[..., None], spec.max_code - zero[..., None])
    codes = (centered_codes + zero[..., None]).astype(np.uint8).reshape(weight.shape)
    zeros = None if spec.symmetric else zero.astype(np.uint8)
    return QuantizedLinear.from_unpacked(spec, codes, scale.astype(spec.scale_array), zeros)


def run(
    weight: Tensor, spec: QuantSpec, importance: Tensor, where: str = "weight", *, keep_size: bool = True
) -> QuantizedLinear:
    """Round a weight [N, K] to nearest on its searched grid.

    Args:
        weight: float.
        spec: the scheme.
        importance: [K] or [N, K].
        where: name of the weight in errors.
        keep_size: stretch the scales as above once the codes are found.

    Raises:
        SpecError: the group size does not divide K, or a number is not finite.
    """
    import torch

    grouped = fake_quant.Grouped.of(weight.float(), spec, where)
    scale, zero = (t[..., None] for t in grid_search.search(weight, spec, importance))
    centered_codes = grid_search.nearest_centered_codes(grouped, scale, zero)
    if keep_size:
        scale = stretched(grouped, scale, zero, importance)
    fake = fake_quant.Fake(centered_codes * scale, centered_codes, centered_codes, scale, zero, torch.ones_like(scale))
    return fake_quant.to_quantized(grouped, fake)


def stretched(grouped: fake_quant.Grouped, scale: Tensor, zero: Tensor, importance: Tensor) -> Tensor:
    """Scales [N, G, 1] with which the grid's nearest codes leave outputs their size; powers of two stay as they are.

    Args:
        grouped: the weight, cut into groups.
        scale: of the searched grid, [N, G, 1].
        zero: zero point, likewise.
        importance: [K] or [N, K].
    """
    if grouped.spec.scale_dtype == "exponent8":
        return scale
    import torch

    h, w = importance.reshape(-1, *grouped.weight.shape[1:]), grouped.weight
    along = (h * w * grid_search.nearest_centered_codes(grouped, scale, zero) * scale).sum(-1, keepdim=True)
    ratio = (h * w.square()).sum(-1, keepdim=True) / along
    # A group whose codes hardly follow its weights has no direction to keep; its scale stays.
    return stored_scales.stored(scale * torch.where((ratio > 0.5) & (ratio < 2), ratio, 1.0), grouped.spec)
