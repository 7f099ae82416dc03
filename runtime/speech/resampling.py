"""Another number of samples per second, by a windowed sinc.

    y[m] = Σ_k x[k] · h(m·rate/wanted − k)      h(t) = c · sinc(c·t) · kaiser(t / T)      c = b · min(1, wanted/rate)

The sum runs over the k within T of the output's place, T = 64 / min(1, wanted/rate) input samples.  With b = 0.955 and
β = 8.96 what lies below 0.91 of the lower half rate passes within 0.001, and what lies above that half rate, which
would come back as another tone, is damped by 90 dB.  Weights of a place depend on (m · rate) mod wanted alone, of which
there are wanted / gcd(rate, wanted): for each of them one product of a matrix of inputs with a vector of weights.
Beyond its ends the sound is silence.

Source: J. O. Smith, Digital Audio Resampling, https://ccrma.stanford.edu/~jos/resample; Kaiser's formula for β.
"""

from __future__ import annotations

from math import ceil, gcd

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from roundexport.errors import UsageError
from roundexport.runtime.types import Floats

from .wav import RATES, Sound

_CROSSINGS = 64
_PASS = 0.955
_BETA = 8.96
_PLACES = np.linspace(0.0, 1.0, 4097)
_WINDOW = np.i0(_BETA * np.sqrt(1 - _PLACES**2)) / np.i0(_BETA)  # from its middle to its end; between them a line
_AT_ONCE = 1 << 20  # products of a matrix at a time, 4 MiB


def resample(sound: Sound, wanted: int) -> Floats:
    """Samples of a sound at another rate.

    Args:
        sound: what to resample.
        wanted: samples per second.

    Returns:
        float32 [ceil(n · wanted / rate)], the first at the same moment as the sound's first.

    Raises:
        UsageError: a rate that cannot be right.
    """
    if not RATES[0] <= wanted <= RATES[1]:
        raise UsageError(f"{wanted} samples per second cannot be right; it should be {RATES[0]} to {RATES[1]}")
    if sound.rate == wanted:
        return sound.samples
    common = gcd(sound.rate, wanted)
    step, phases = sound.rate // common, wanted // common
    reach = ceil(_CROSSINGS * max(1.0, sound.rate / wanted))
    out = np.zeros(-(-len(sound.samples) * phases // step), np.float32)
    padded = np.pad(sound.samples, (reach, reach + step + 1))
    windows = sliding_window_view(padded, 2 * reach + 1)
    rows = max(1, _AT_ONCE // (2 * reach + 1))
    for first in range(min(phases, len(out))):
        place, phase = divmod(first * step, phases)
        weights = _weights(phase / phases, reach, wanted / sound.rate)
        count = len(range(first, len(out), phases))
        inputs = windows[place::step][:count]
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            out[first + start * phases : first + (stop - 1) * phases + 1 : phases] = inputs[start:stop] @ weights
    return out


def _weights(phase: float, reach: int, ratio: float) -> NDArray[np.float32]:
    """Weights of the inputs from ``reach`` before to ``reach`` after an output's place, which is ``phase`` past one."""
    away = np.arange(-reach, reach + 1) - phase
    scale = _PASS * min(1.0, ratio)
    window = np.interp(np.abs(away) / (reach + 1), _PLACES, _WINDOW)
    weights: NDArray[np.float32] = (scale * np.sinc(scale * away) * window).astype(np.float32)
    return weights
