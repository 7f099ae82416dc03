"""What a model that hears is calibrated on: the features of sounds in a folder of wav files.

Files are taken in the order of their names; one longer than the model hears at a time is cut there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import UsageError

from .waveforms import wav_files

if TYPE_CHECKING:
    from roundexport.model.checkpoint import Checkpoint


def sounds(checkpoint: Checkpoint, source: str, count: int) -> NDArray[np.float32] | None:
    """Features [n, mels, frames] of the first sounds of a folder; None of a model that reads text.

    Args:
        checkpoint: the model, whose files say how features are made.
        source: a folder of wav files.
        count: most sounds.

    Raises:
        UsageError: no such folder, or no sound in it.
    """
    if checkpoint.task != "transcribe":
        return None
    from roundexport.runtime.speech.features import read_features
    from roundexport.runtime.speech.resampling import resample
    from roundexport.runtime.speech.wav import read_wav

    files = wav_files(source)[:count]
    if not files:
        raise UsageError(
            f"calibration {source!r}: this model hears; give a folder of .wav files with speech "
            "(--calibration FOLDER), or take a method that needs no samples (--algorithm rtn)"
        )
    made = read_features(checkpoint.folder)
    longest = made.chunk_length * made.sampling_rate
    found = []
    for file in files:
        found.append(made.window_of(resample(read_wav(file), made.sampling_rate)[:longest]))
    return np.stack(found).astype(np.float32)
