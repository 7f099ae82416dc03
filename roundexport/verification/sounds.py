"""What a package that writes down sounds frame by frame lost: logits of the float model and of the package.

Figures are those of heads (heads.py), over the frames of windows of held-out sounds: the share of frames whose
likeliest letter is the same, the error of the logits, and the KL over the letters.  Most frames are blank, and easy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from roundexport.calibration.waveforms import sound_windows
from roundexport.errors import UsageError
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.output_head import output_tensor

from .heads import compare_logits
from .report import HeadQuality

if TYPE_CHECKING:
    from roundexport.runtime.frame_transcription import FrameTranscriber


def measure_sounds(
    checkpoint: Checkpoint, engine: FrameTranscriber, folder: str, count: int, frames: int
) -> HeadQuality:
    """Figures of a package over windows of the sounds in a folder.

    Args:
        checkpoint: the float model.
        engine: the package.
        folder: of wav files.
        count: most windows.
        frames: in a window.

    Raises:
        UsageError: less than two windows.
    """
    import torch

    windows, _ = sound_windows(checkpoint, folder, count, frames)
    if len(windows) < 2:
        raise UsageError(f"--text {folder}: figures with a standard error need two windows; give more sound")
    model = checkpoint.load_model()
    floats, found = [], []
    for window in windows:
        with torch.no_grad():
            told = output_tensor(model(input_values=torch.from_numpy(window[None]))).numpy()[0]
        floats.append(told.astype(np.float64))
        found.append(engine.output({"input_values": window[None]})[0].astype(np.float64))
    return compare_logits(floats, found)
