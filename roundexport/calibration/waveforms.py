"""What a model that reads samples is calibrated and checked on: windows of the sounds in a folder, or drawn samples.

    FOLDER ─ *.wav in order of their names ─ resampled, each normalized as the model wants it ─ joined ─ cut to windows

All windows have one length, so that none is padded: a model that was not trained with a mask hears padding.
Drawn samples (noise with a spectrum that falls, as of voices) serve checks of equality; they are no speech.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import UsageError

if TYPE_CHECKING:
    from roundexport.model.checkpoint import Checkpoint

Samples = NDArray[np.float32]
_LONGEST = 20  # seconds of a window


def wav_files(source: str | Path) -> list[Path]:
    """The sounds of a folder in the order in which they are read; none where there is no folder."""
    return sorted(Path(source).glob("*.wav"))


def sound_windows(checkpoint: Checkpoint, source: str, count: int, frames: int) -> tuple[Samples, list[Path]]:
    """Windows [n, T] of the sounds in a folder, and the files that they are from.

    Args:
        checkpoint: the model, whose files say how it wants them.
        source: the folder.
        count: most windows.
        frames: of the model, in a window; at most 20 seconds are taken.

    Raises:
        UsageError: no such folder, or no sound in it, or too little.
    """
    from roundexport.runtime.speech.resampling import resample
    from roundexport.runtime.speech.wav import read_wav
    from roundexport.runtime.speech.waveform import frame_size, read_waveform

    files = wav_files(source)
    if not files:
        raise UsageError(
            f"{source!r}: this model hears; give a folder of .wav files with speech (--calibration FOLDER, or --text "
            "FOLDER of verify), or take a method that needs no samples (--algorithm rtn)"
        )
    made = read_waveform(checkpoint.folder)
    length = min(frames * frame_size(checkpoint.config, checkpoint.location), _LONGEST * made.sampling_rate)
    parts: list[Samples] = []
    for file in files:
        parts.append(made(resample(read_wav(file), made.sampling_rate)))
        if sum(map(len, parts)) >= count * length:
            break
    joined = np.concatenate(parts)
    whole = len(joined) // length
    if not whole:
        raise UsageError(f"{source!r} holds {len(joined) / made.sampling_rate:.1f} s of sound; one window takes "
                         f"{length / made.sampling_rate:.1f} s: give more, or a smaller sample_len")  # fmt: skip
    return joined[: whole * length].reshape(whole, length)[:count], files[: len(parts)]


def drawn_samples(count: int, length: int, seed: int) -> Samples:
    """Samples [count, length] of noise whose power falls with the square of the frequency; mean 0, variance 1."""
    generator = np.random.default_rng(seed)
    spectrum = np.fft.rfft(generator.standard_normal((count, length)))
    spectrum[:, 1:] /= np.arange(1, spectrum.shape[1])
    spectrum[:, 0] = 0
    drawn = np.fft.irfft(spectrum, length)
    normed: Samples = (drawn / drawn.std(-1, keepdims=True)).astype(np.float32)
    return normed


def samples_digest(samples: Samples) -> str:
    """The sha256 of samples as little-endian float32, row by row."""
    return hashlib.sha256(np.ascontiguousarray(samples, "<f4").tobytes()).hexdigest()
