"""Coordinate descent on codes in Gram space: every weight goes to the code that is best given all the others.

A linear's output error over all calibration tokens is quadratic in its quantized weight, with the Gram matrix
H = Σ x̂ᵀx̂ [K, K].  Per row, with ŵ = s·c (c = code - z) and target t:

    loss(ŵ) = (ŵ - t) H (ŵ - t)ᵀ        gradient/2  γ = (ŵ - t) H

Groups of columns are visited in turn.  Within a group only the γ of its own columns changes, through the diagonal
block B of H, which stays in cache:

    scale    δ = -Σ c·γ / (c B cᵀ),  s ← s + δ,  γ ← γ + δ·c B            the best scale for the codes as they are
    codes    for each column j:  c_j ← clamp(round(c_j - γ_j / (B_jj·s)), -z, L - z),  γ ← γ + Δc_j·s·B_j

repeated a few times.  Then one product updates the gradient of the other groups, Γ ← Γ + ΔŴ H[group].  A sweep over
the matrix costs 2·K²·N floating-point operations for any number of tokens, nearly all in that product.  The loss is
exact and never rises; there is no sampling and no learning rate.  The descent ends when a sweep moves at most one code
in a thousand; the loss can then fall by a few ten-thousandths at most.

`run` compiles the visit of a group with numba, rows shared out to threads; `on_device` is the same visit batched over
rows in torch, for other devices or without numba.  In: codes, scales, zero points to start from, their gradient Γ
[N, K], H [K, K].  Out: the same, better.  Limits: a local minimum of single moves; H must be positive on its diagonal
(damped).  Source: closed-form scale and greedy coordinate moves are those of lattice decoding; in quantization as in
Behdin et al., QuantEase, arXiv 2309.01885.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ._numba import available, in_threads, njit

if TYPE_CHECKING:
    from torch import Tensor

_SETTLED = 1 / 1000  # moves of a sweep per code; with no more than that it is the last


@dataclass(frozen=True, eq=False)
class Rounding:
    """A weight on its way; float32 torch tensors, changed in place.

    Args:
        centered_codes: code - z, whole numbers [N, K].
        scale: [N, G].
        zero_point: whole numbers [N, G].
        max_code: L.
        held: groups [N, G] whose codes stay 0; None: no group.
    """

    centered_codes: Tensor
    scale: Tensor
    zero_point: Tensor
    max_code: int
    held: Tensor | None = None

    def weight(self) -> Tensor:
        """ŵ [N, K]."""
        rows, groups = self.scale.shape
        return (self.centered_codes.view(rows, groups, -1) * self.scale[..., None]).view(rows, -1)

    def limits(self, group: int) -> tuple[Tensor, Tensor]:
        """Least and largest centered code [N] of a group in each row."""
        low, high = -self.zero_point[:, group], self.max_code - self.zero_point[:, group]
        if self.held is None:
            return low, high
        return low.masked_fill(self.held[:, group], 0.0), high.masked_fill(self.held[:, group], 0.0)

    def gradient(self, target: Tensor, gram: Tensor) -> Tensor:
        """Γ = (Ŵ - T) H [N, K]."""
        return (self.weight() - target) @ gram


def reference(
    centered_codes: NDArray[np.floating],
    scale: NDArray[np.floating],
    low: NDArray[np.floating],
    high: NDArray[np.floating],
    gradient: NDArray[np.floating],
    block: NDArray[np.floating],
    *,
    refit: bool = True,
    passes: int = 2,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One visit to a group, in float64 and plain Python.

    Args:
        centered_codes: c [N, group].
        scale: s [N].
        low: least step per row [N].
        high: largest step per row [N].
        gradient: γ [N, group].
        block: B [group, group].
        refit: let the scale move too.
        passes: rounds of scale and codes.

    Returns:
        Steps and scales after it.
    """
    c, s, g = (np.array(values, np.float64) for values in (centered_codes, scale, gradient))
    _rows(c, s, low, high, g, np.asarray(block, np.float64), refit, passes, 0, len(c))
    return c, s


def run(rounding: Rounding, gradient: Tensor, gram: Tensor, sweeps: int, refit: bool = True, passes: int = 2) -> None:
    """Descend, compiled where that is possible.

    Args:
        rounding: where to start; changed in place.
        gradient: Γ there, float32 [N, K]; changed along with it.
        gram: H, float32 [K, K], symmetric, positive on its diagonal.
        sweeps: visits to every group at most.
        refit: let the scales move too.
        passes: rounds of scale and codes per visit.
    """
    compiled = gradient.device.type == "cpu" and available() is None
    visit = _visit_compiled if compiled else _visit
    _descend(rounding, gradient, gram, sweeps, functools.partial(visit, refit=refit, passes=passes))


def on_device(
    rounding: Rounding, gradient: Tensor, gram: Tensor, sweeps: int, refit: bool = True, passes: int = 2
) -> None:
    """:func:`run` in torch, where the tensors are."""
    _descend(rounding, gradient, gram, sweeps, functools.partial(_visit, refit=refit, passes=passes))


def _descend(rounding: Rounding, gradient: Tensor, gram: Tensor, sweeps: int, visit: Callable[..., int]) -> None:
    import torch

    groups = rounding.scale.shape[1]
    width = gradient.shape[1] // groups
    for _ in range(sweeps):
        moved = 0
        for group in range(groups):
            part = slice(group * width, (group + 1) * width)
            centered_codes = rounding.centered_codes[:, part].contiguous()
            scale = rounding.scale[:, group].contiguous()
            before = centered_codes * scale[:, None]
            limits = rounding.limits(group)
            # A copy even where one group is the whole row: the visit changes it, and the product below adds that again.
            own = gradient[:, part].clone(memory_format=torch.contiguous_format)
            moved += visit(centered_codes, scale, *limits, own, gram[part, part].contiguous())
            rounding.centered_codes[:, part] = centered_codes
            rounding.scale[:, group] = scale
            gradient.addmm_(centered_codes * scale[:, None] - before, gram[part])
        if moved <= _SETTLED * gradient.numel():
            break


def _visit(
    centered_codes: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    gradient: Tensor,
    block: Tensor,
    refit: bool,
    passes: int,
) -> int:
    """Improve a group's centered codes [N, group] and scale [N] in place; returns how many codes moved."""
    import torch

    moved = 0
    for _ in range(passes):
        if refit:
            product = centered_codes @ block
            square = (centered_codes * product).sum(1)
            delta = torch.where(square > 0, -(centered_codes * gradient).sum(1) / square, torch.zeros_like(square))
            delta = torch.where((scale + delta) * scale > 0, delta, torch.zeros_like(delta))
            scale += delta
            gradient += delta[:, None] * product
        changed = 0
        for j in range(centered_codes.shape[1]):
            new = torch.round(centered_codes[:, j] - gradient[:, j] / (block[j, j] * scale))
            new = torch.maximum(torch.minimum(new, high), low)
            by = new - centered_codes[:, j]
            centered_codes[:, j] = new
            gradient += (by * scale)[:, None] * block[j]
            changed += int(torch.count_nonzero(by))
        moved += changed
        if not changed:
            break
    return moved


def _visit_compiled(
    centered_codes: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    gradient: Tensor,
    block: Tensor,
    refit: bool,
    passes: int,
) -> int:
    arrays = [tensor.numpy() for tensor in (centered_codes, scale, low, high, gradient, block)]
    loop = _compiled()
    return sum(in_threads(lambda *rows: int(loop(*arrays, refit, passes, *rows)), len(centered_codes)))


@functools.cache
def _compiled() -> Any:
    return njit(_rows, fastmath={"reassoc", "contract", "nsz"})


def _rows(  # noqa: PLR0912, PLR0913, PLR0917, C901  (one loop nest, which is compiled as a whole)
    centered_codes: Any,
    scale: Any,
    low: Any,
    high: Any,
    gradient: Any,
    block: Any,
    refit: bool,
    passes: int,
    first: int,
    last: int,
) -> int:
    """:func:`_visit` for rows ``first`` … ``last``; plain Python until it is compiled."""
    width = centered_codes.shape[1]
    moved = 0
    product = np.empty_like(gradient[0])
    for row in range(first, last):
        c, g, s = centered_codes[row], gradient[row], scale[row]
        for _ in range(passes):
            if refit:
                product[:] = 0
                for j in range(width):
                    if c[j] != 0:
                        for i in range(width):
                            product[i] += c[j] * block[j, i]
                along = square = product[0] * 0  # of the arrays' own dtype
                for i in range(width):
                    along += c[i] * g[i]
                    square += c[i] * product[i]
                if square > 0:
                    delta = -along / square
                    if (s + delta) * s > 0:  # a scale that changed its sign would turn its codes round
                        s += delta
                        for i in range(width):
                            g[i] += delta * product[i]
            changed = 0
            for j in range(width):
                new = min(max(np.rint(c[j] - g[j] / (block[j, j] * s)), low[row]), high[row])
                if new != c[j]:
                    by = (new - c[j]) * s
                    c[j] = new
                    changed += 1
                    for i in range(width):
                        g[i] += by * block[j, i]
            moved += changed
            if changed == 0:
                break
        scale[row] = s
    return moved
