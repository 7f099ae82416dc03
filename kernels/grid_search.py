"""Grid search: per group, the scale and zero point whose nearest codes leave the least weighted error.

With w the group's weights, h ≥ 0 their importance (by input channel), c = code - z the centered codes, L = 2**bits - 1:

    loss(s, z) = Σ h·(s·c - w)²        c = clamp(round(w / s), -z, L - z)
    symmetric    z = 2**(bits-1), and s of either sign: the side with one step more may be the lower or the upper one
    asymmetric   s > 0, z = 0 … L: scale and zero point searched together

The codes are constant over an interval of scales, and the best scale for given codes is s* = Σh·c·w / Σh·c².  So each
candidate is scored by its loss after that refit, Σh·w² - A²/B with A = Σh·c·w and B = Σh·c².  The largest A²/B wins,
and few candidates suffice.  Scales that are powers of two cannot be refitted; their score is 2·s·A - s²·B.

    coarse   scales m·s₀ with s₀ of round to nearest and m a geometric row of multipliers by bits (_RANGES), times both
             signs, or times the zero points that keep the largest weight, the least weight, or lie between: all of them
             at 2 and 3 bits, 6 at equal distances above
    fine     scales a fraction of the coarse ratio either way of the winner, times zero points one either way
    settle   round the scale to its stored dtype, recompute the codes, refit; twice more; keep the least loss

Round to nearest is a candidate of the last comparison, so the result is never worse than it.

A and B of a candidate are sums over the group, in the order of the weights, without fused multiply-add.  The inner loop
runs over candidates, so that it vectorizes.  `run` compiles it with numba, on as many threads as torch uses;
`reference` computes the same sums in numpy and `on_device` in torch, for any device.  All three choose the same grid.
At 8 bits sums are float64, because the losses are a millionth of Σh·w².

In: weight [N, K], importance [K] or [N, K].  Out: scale, zero point [N, G].  Limits: weights of importance 0 are free;
give them a little if their inputs are not truly dead.  Sources: llama.cpp make_qx_quants; SignRoundV2, arXiv 2512.04746
(scale search); NeUQI, arXiv 2505.17595 (joint search of zero points).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import SpecError
from roundexport.quant.spec import QuantSpec

from . import fake_quant, stored_scales
from ._numba import available, njit

if TYPE_CHECKING:
    from torch import Tensor

# bits: (least, largest multiplier of the min-max scale, coarse scales, coarse zero points)
_RANGES = {2: (0.25, 1.6, 32, 4), 3: (0.25, 1.4, 32, 8), 4: (0.3, 1.3, 32, 6), 8: (0.8, 1.05, 64, 6)}
_FINE = 8  # fine scales either way of the winner
_SETTLE = 3  # scales tried when settling: the one found and two refits
_CHUNK = 1 << 20  # weights searched at a time
_MARGIN = 1 - 1e-5  # of the loss of round to nearest, which float32 sums can tell apart

_Score = Callable[["_Groups", "Tensor", "Tensor"], "Tensor"]


def search(weight: Tensor, spec: QuantSpec, importance: Tensor) -> tuple[Tensor, Tensor]:
    """The grid of a weight, by the fastest means there are.

    Args:
        weight: float [N, K], finite.
        spec: the scheme.
        importance: float [K] or [N, K], finite, not negative; only its ratios within a group matter.

    Returns:
        Scale [N, G], float32 values that the stored dtype holds exactly, negative ones too when symmetric; and zero
        point [N, G], whole float32 numbers, the midpoint when symmetric.

    Raises:
        SpecError: the group size does not divide K, shapes differ, or a number is not finite or negative.
    """
    compiled = available() is None and weight.device.type == "cpu"
    return (run if compiled else on_device)(weight, spec, importance)


def run(weight: Tensor, spec: QuantSpec, importance: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`search` with the compiled loop, in main memory."""
    return _search(weight, spec, importance, _score_compiled)


def on_device(weight: Tensor, spec: QuantSpec, importance: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`search` in torch, where the weight is."""
    return _search(weight, spec, importance, _score_torch)


def reference(
    weight: NDArray[np.float32], spec: QuantSpec, importance: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """:func:`search` with the sums in numpy."""
    import torch

    scale, zero = _search(torch.from_numpy(weight), spec, torch.from_numpy(importance), _score_numpy)
    return scale.numpy(), zero.numpy()


@dataclass(frozen=True, eq=False)
class _Groups:
    """M groups of some rows, in units of each group's largest magnitude.

    Args:
        spec: the scheme.
        weight: w [M, group], at most 1 in magnitude.
        importance: h [G or M, group]; row m % len goes with group m.
        size: [M, 1], what the weight was divided by.
        span: largest less least weight [M, 1], zero counted among them.
        least: least weight [M, 1], at most 0.
    """

    spec: QuantSpec
    weight: Tensor
    importance: Tensor
    size: Tensor
    span: Tensor
    least: Tensor


def _search(weight: Tensor, spec: QuantSpec, importance: Tensor, score: _Score) -> tuple[Tensor, Tensor]:
    import torch

    with torch.no_grad():
        grouped = fake_quant.Grouped.of(weight.float(), spec)
        rows, groups, width = grouped.weight.shape
        if not bool(torch.isfinite(grouped.largest - grouped.least).all()):
            raise SpecError("grid search: the weight holds values that are not finite")
        shared = _normalized(importance.to(weight.device).float(), grouped.weight.shape)
        parts = []
        step = max(1, _CHUNK // (groups * max(width, 64)))
        for first in range(0, rows, step):
            part = slice(first, first + step)
            piece = fake_quant.Grouped(spec, grouped.weight[part], grouped.least[part], grouped.largest[part])
            h = shared if len(shared) == 1 else shared[part]
            parts.append(_settle(piece, h, *_found(piece, h, score)))
        scale, zero = (torch.cat(found) for found in zip(*parts, strict=True))
        return scale, zero


def _normalized(importance: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Importance [1 or N, G, group] with a mean of 1 in each group; a group that nothing reaches counts evenly."""
    import torch

    rows, groups, width = shape
    if tuple(importance.shape) not in {(groups * width,), (rows, groups * width)}:
        raise SpecError(
            f"grid search: importance {list(importance.shape)} does not go with K={groups * width}, N={rows}"
        )
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise SpecError("grid search: importance must be finite and not negative")
    grouped = importance.reshape(-1, groups, width)
    # By the largest first: squares of float32 inputs may be as small as 1e-38 or as large as their mean overflows.
    largest = grouped.amax(-1, keepdim=True)
    grouped = torch.where(largest > 0, grouped / largest.clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    return grouped / grouped.mean(-1, keepdim=True)


def _found(grouped: fake_quant.Grouped, importance: Tensor, score: _Score) -> tuple[Tensor, Tensor]:
    """Best scale, not yet rounded to its stored dtype, and zero point, [N, G, 1]."""
    import torch

    spec, (rows, groups, width) = grouped.spec, grouped.weight.shape
    dtype = torch.float64 if spec.bits == 8 else torch.float32
    size = torch.maximum(-grouped.least, grouped.largest).view(-1, 1)
    size = torch.where(size > 0, size, 1.0)
    data = _Groups(
        spec,
        (grouped.weight.view(-1, width) / size).to(dtype),
        importance.reshape(-1, width).to(dtype),
        size,
        (grouped.largest - grouped.least).view(-1, 1) / size,
        grouped.least.view(-1, 1) / size,
    )
    scale, zero = _best(data, *_coarse(data), score)
    if not spec.scale_dtype == "exponent8":
        scale, zero = _best(data, *_fine(data, scale, zero), score)
    return (scale * size).view(rows, groups, 1), zero.view(rows, groups, 1)


def _best(data: _Groups, scale: Tensor, zero: Tensor, score: _Score) -> tuple[Tensor, Tensor]:
    """The candidate of the highest score in each row of [M, C], as [M, 1]."""
    index = score(data, scale, zero).argmax(1, keepdim=True)
    return scale.gather(1, index), zero.gather(1, index)


def _coarse(data: _Groups) -> tuple[Tensor, Tensor]:
    """Candidates spread over everything worth trying, [M, C] each."""
    import torch

    spec, device = data.spec, data.weight.device
    least, largest, count, zeros = _RANGES[spec.bits]
    ratio = (largest / least) ** (1 / (count - 1))
    multiplier = torch.tensor([least * ratio**i for i in range(count)], device=device)
    if spec.scale_dtype == "exponent8":
        return _powers(data, least, largest, zeros)
    if spec.symmetric:
        scale = torch.cat([multiplier, -multiplier]) / spec.midpoint
        scale = scale.expand(len(data.weight), -1).contiguous()
        return scale, torch.full_like(scale, spec.midpoint)
    return _with_zeros(data, data.span.clamp(min=1e-6) * multiplier / spec.max_code, zeros)


def _powers(data: _Groups, least: float, largest: float, zeros: int) -> tuple[Tensor, Tensor]:
    """Every power of two in the range, in units of the group's size."""
    import torch

    spec = data.spec
    span = torch.ones_like(data.span) / spec.midpoint if spec.symmetric else data.span / spec.max_code
    start = stored_scales.stored(data.size * span * least, spec)
    doublings = range(int(np.ceil(np.log2(largest / least))) + 2)
    size = torch.cat([stored_scales.stored(start * 2.0**i, spec) for i in doublings], 1) / data.size
    if spec.symmetric:
        size = torch.cat([size, -size], 1)
        return size, torch.full_like(size, spec.midpoint)
    return _with_zeros(data, size, spec.max_code + 1 if spec.bits < 8 else zeros)


def _with_zeros(data: _Groups, scale: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Each scale [M, S] with ``count`` zero points: [M, S·count]."""
    import torch

    top = data.spec.max_code
    if count > top:  # all there are
        zero = torch.arange(top + 1.0, device=scale.device).expand(*scale.shape, -1)
    else:
        keeps_least, keeps_largest = -data.least / scale, top - (data.least + data.span) / scale
        low = torch.minimum(keeps_least, keeps_largest).clamp(0, top)[..., None]
        high = torch.maximum(keeps_least, keeps_largest).clamp(0, top)[..., None]
        share = torch.linspace(0, 1, count, device=scale.device)
        zero = torch.round(low + (high - low) * share)
    return scale[..., None].expand(*zero.shape).flatten(1).contiguous(), zero.flatten(1).contiguous()


def _fine(data: _Groups, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates about the winner [M, 1] of the coarse ones; itself among them."""
    import torch

    spec = data.spec
    least, largest, count, _ = _RANGES[spec.bits]
    step = (largest / least) ** (1 / (count - 1) / _FINE)
    multiplier = torch.tensor([step**i for i in range(-_FINE, _FINE + 1)], device=scale.device)
    near = scale * multiplier
    if spec.symmetric:
        return near, torch.full_like(near, spec.midpoint)
    around = (zero + torch.tensor([-1.0, 0.0, 1.0], device=scale.device)).clamp(0, spec.max_code)
    shape = (len(near), near.shape[1], around.shape[1])
    return near[:, :, None].expand(shape).flatten(1), around[:, None, :].expand(shape).flatten(1)


def _settle(grouped: fake_quant.Grouped, importance: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Stored scale and zero point [N, G] of the least loss among the one found, its refits, and round to nearest."""
    import torch

    spec, ones = grouped.spec, torch.ones_like(grouped.least)
    nearest = fake_quant.run(grouped, torch.zeros_like(grouped.weight), ones, ones)
    kept = nearest.scale.clone(), nearest.zero_point.clone()
    least = _MARGIN * (importance * (nearest.weight - grouped.weight).square_()).sum(-1, keepdim=True)
    for _ in range(_SETTLE):
        scale = stored_scales.stored(scale, spec)
        centered = nearest_centered_codes(grouped, scale, zero)
        weighted = importance * centered
        loss = (importance * (centered * scale - grouped.weight).square_()).sum(-1, keepdim=True)
        better = loss < least
        kept = torch.where(better, scale, kept[0]), torch.where(better, zero, kept[1])
        least = torch.where(better, loss, least)
        # Steps that are all zero say nothing about the scale.
        energy = (weighted * centered).sum(-1, keepdim=True)
        scale = torch.where(energy > 0, (weighted * grouped.weight).sum(-1, keepdim=True) / energy, scale)
    return kept[0].squeeze(-1), kept[1].squeeze(-1)


def nearest_centered_codes(grouped: fake_quant.Grouped, scale: Tensor, zero: Tensor) -> Tensor:
    """Steps code - z [N, G, group] that lie nearest to the weight on a grid.

    Args:
        grouped: the weight.
        scale: [N, G, 1], stored values.
        zero: zero point [N, G, 1].
    """
    import torch

    centered = (grouped.weight / scale).round_()
    return torch.maximum(torch.minimum(centered, grouped.spec.max_code - zero), -zero)


def _score_torch(data: _Groups, scale: Tensor, zero: Tensor) -> Tensor:
    import torch

    inverse, zero = 1 / scale.to(data.weight.dtype), zero.to(data.weight.dtype)
    low, high = -zero, data.spec.max_code - zero
    index = torch.arange(len(data.weight), device=scale.device) % len(data.importance)
    a, b = torch.zeros_like(inverse), torch.zeros_like(inverse)
    for i in range(data.weight.shape[1]):
        w, h = data.weight[:, i : i + 1], data.importance[index, i : i + 1]
        centered = torch.maximum(torch.minimum(w * inverse, high), low).round_()
        a += (h * w) * centered
        b += (h * centered) * centered
    return _scored(data.spec, scale.to(a.dtype), a, b)


def _score_numpy(data: _Groups, scale: Tensor, zero: Tensor) -> Tensor:
    import torch

    weight, importance = data.weight.numpy(), data.importance.numpy()
    inverse, offset = 1 / scale.to(data.weight.dtype).numpy(), zero.to(data.weight.dtype).numpy()
    low, high = -offset, data.spec.max_code - offset
    index = np.arange(len(weight)) % len(importance)
    a, b = np.zeros_like(inverse), np.zeros_like(inverse)
    for i in range(weight.shape[1]):
        w, h = weight[:, i, None], importance[index, i, None]
        centered = np.rint(np.maximum(np.minimum(w * inverse, high), low))
        a += (h * w) * centered
        b += (h * centered) * centered
    return _scored(data.spec, scale.to(data.weight.dtype), torch.from_numpy(a), torch.from_numpy(b))


def _score_compiled(data: _Groups, scale: Tensor, zero: Tensor) -> Tensor:
    import torch

    dtype = data.weight.dtype
    a, b = torch.empty_like(scale, dtype=dtype), torch.empty_like(scale, dtype=dtype)
    inverse, zero = 1 / scale.to(dtype), zero.to(dtype)
    arrays = [t.contiguous().numpy() for t in (data.weight, data.importance, inverse, -zero, data.spec.max_code - zero)]
    # x + magic - magic rounds x half to even: the sum has no bits left below one.
    magic = arrays[0].dtype.type(1.5 * 2.0 ** (52 if dtype == torch.float64 else 23))
    threads = max(1, min(torch.get_num_threads(), len(a)))
    edges = np.linspace(0, len(a), threads + 1).astype(int)
    loop = _compiled()

    def part(first: int, last: int) -> None:
        loop(*arrays, magic, first, last, a.numpy(), b.numpy())

    if threads == 1:
        part(0, len(a))
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(part, edges[:-1], edges[1:]))
    return _scored(data.spec, scale.to(dtype), a, b)


def _scored(spec: QuantSpec, scale: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Score of a candidate from its sums; higher is better."""
    import torch

    if spec.scale_dtype == "exponent8":
        return 2 * scale * a - scale * scale * b
    return torch.where(b > 0, a * a / b, 0.0)


@functools.cache
def _compiled() -> Any:
    return njit(_sums)


def _sums(  # noqa: PLR0913, PLR0917  (compiled code takes arrays, not objects)
    weight: Any, importance: Any, inverse: Any, low: Any, high: Any, magic: Any, first: int, last: int, a: Any, b: Any
) -> None:
    """A and B of every candidate [M, C] of groups ``first`` … ``last``; plain Python until it is compiled."""
    for m in range(first, last):
        h_row = m % len(importance)
        for c in range(inverse.shape[1]):
            a[m, c] = 0
            b[m, c] = 0
        for i in range(weight.shape[1]):
            w = weight[m, i]
            h = importance[h_row, i]
            hw = h * w
            for c in range(inverse.shape[1]):
                centered = max(min(w * inverse[m, c], high[m, c]), low[m, c])
                centered = (centered + magic) - magic
                a[m, c] += hw * centered
                b[m, c] += (h * centered) * centered
