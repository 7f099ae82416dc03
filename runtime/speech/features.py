"""Log-mel features as Whisper was trained on them: what transformers' WhisperFeatureExtractor gives, within 1e-5.

    frames     s_t = samples[t·hop − n/2 … t·hop + n/2) · hann(n), the sound mirrored at its ends, t < samples / hop
    power      P = |FFT(s_t)|²                                       n = 400, hop = 160: 100 frames a second
    mel        M = F · P,   F_i the triangle over (f_i, f_i+1, f_i+2), its area scaled by 2 / (f_i+2 − f_i)
    log        L = log10(max(M, 1e-10)),   features = (max(L, max(L) − 8) + 4) / 4

The frequencies f_i are equally far apart on Slaney's scale, 0 to 8000 Hz: 3·f/200 below 1000 Hz, above it
15 + 27 · ln(f/1000) / ln 6.4.  The maximum is taken over the whole sound, which is why a sound's features are computed
once and cut into windows afterwards.  Everything is computed in float64, a thousand frames at a time.

Sizes are read from ``preprocessor_config.json``, or from ``feature_extractor`` in ``processor_config.json``, where
newer releases of transformers write them.

Source: https://arxiv.org/abs/2212.04356, section 2.2; M. Slaney, Auditory Toolbox, 1998; transformers' audio_utils.py.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from roundexport.errors import ArtifactError, UnsupportedError
from roundexport.runtime.tokenizer import read_json
from roundexport.runtime.types import Floats
from roundexport.storage.paths import ListedFiles

KIND = "WhisperFeatureExtractor"
_TOP = 8000.0
_AT_ONCE = 1000
_SIZES = {
    "feature_size": (1, 1024),
    "sampling_rate": (1000, 192_000),
    "hop_length": (1, 1 << 16),
    "chunk_length": (1, 600),
    "n_fft": (2, 1 << 16),
}


@dataclass(frozen=True)
class LogMel:
    """The features of a model.

    Args:
        feature_size: mel bands.
        sampling_rate: samples per second.
        hop_length: samples from frame to frame.
        chunk_length: seconds that the model hears at a time.
        n_fft: samples of a frame.
    """

    feature_size: int = 80
    sampling_rate: int = 16_000
    hop_length: int = 160
    chunk_length: int = 30
    n_fft: int = 400

    @property
    def window(self) -> int:
        """Frames that the model hears at a time."""
        return self.chunk_length * self.sampling_rate // self.hop_length

    @property
    def frames_per_second(self) -> float:
        """Frames of a second."""
        return self.sampling_rate / self.hop_length

    @cached_property
    def filters(self) -> NDArray[np.float64]:
        """Triangles [bands, n_fft // 2 + 1]."""
        scale = np.linspace(0.0, _mel(min(_TOP, self.sampling_rate / 2)), self.feature_size + 2)
        edges = _hertz(scale)
        bins = np.linspace(0.0, self.sampling_rate // 2, self.n_fft // 2 + 1)
        low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
        triangles = np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle))
        return np.maximum(0.0, triangles) * 2 / (high - low)

    def window_of(self, samples: Floats) -> Floats:
        """Features [bands, window] of a sound that the model hears at once; silence is put behind it.

        Args:
            samples: at most ``chunk_length`` seconds, ``sampling_rate`` a second.
        """
        return self.of(np.pad(samples, (0, self.chunk_length * self.sampling_rate - len(samples))))

    def of(self, samples: Floats) -> Floats:
        """Features [bands, T] of a sound of at least half a frame."""
        half = self.n_fft // 2
        padded = np.pad(samples, (half, half), mode="reflect")
        frames = sliding_window_view(padded, self.n_fft)[:: self.hop_length][: len(samples) // self.hop_length]
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self.n_fft) / self.n_fft)
        logs = np.empty((self.feature_size, len(frames)), np.float32)
        for start in range(0, len(frames), _AT_ONCE):
            power = np.abs(np.fft.rfft(frames[start : start + _AT_ONCE] * hann)) ** 2
            logs[:, start : start + _AT_ONCE] = np.log10(np.maximum(self.filters @ power.T, 1e-10))
        np.maximum(logs, logs.max() - 8.0, out=logs)
        return (logs + 4.0) / 4.0


def read_features(folder: Path, listed: Collection[str] | None = None) -> LogMel:
    """The features that a folder's files describe.

    Args:
        folder: package folder.
        listed: files that the package's manifest lists, which alone are read; None: all.

    Raises:
        ArtifactError: no such file, or a size in it makes no sense.
        UnsupportedError: features of another kind.
    """
    files = ListedFiles(folder, listed)
    name = "preprocessor_config.json"
    found = read_json(files.find(name))
    if not found:
        name = "processor_config.json"
        found = read_json(files.find(name)).get("feature_extractor", {})
    where = folder / name
    if not isinstance(found, dict) or not found:
        raise ArtifactError(f"{folder}: neither preprocessor_config.json nor processor_config.json says what is heard")
    _check(found, where)
    sizes = {key: found[key] for key in _SIZES if key in found}
    for key, (least, most) in _SIZES.items():
        value = sizes.get(key, least)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ArtifactError(f"{where}: {key} must be a whole number from {least} to {most}, not {value!r}")
    made = LogMel(**sizes)
    if max(made.n_fft, made.hop_length) > made.chunk_length * made.sampling_rate:
        raise ArtifactError(f"{where}: a frame is longer than the {made.chunk_length} s that the model hears at a time")
    return made


def _check(found: dict[str, Any], where: Path) -> None:
    """Refuse features that are computed otherwise."""
    kind = found.get("feature_extractor_type", KIND)
    if kind != KIND:
        raise UnsupportedError(f"{where}: features of kind {kind}; only those of {KIND} are computed here")
    for key in ("dither", "do_normalize", "padding_value"):
        if found.get(key):
            raise UnsupportedError(f"{where}: {key} = {found[key]!r} is not computed here; Whisper has none")


def _mel(hertz: float) -> float:
    if hertz < 1000:
        return 3 * hertz / 200
    return float(15 + 27 * np.log(hertz / 1000) / np.log(6.4))


def _hertz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
    above = np.maximum(mels, 15.0) - 15.0
    return np.where(mels < 15, 200 * mels / 3, 1000 * np.exp(np.log(6.4) / 27 * above))
