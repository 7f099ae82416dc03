"""What a package of images lost: vectors or logits of the float model and of the package, of the same pictures.

Pictures are those of a folder that the user names, else drawn ones (calibration/images.py) of a seed that tuning did
not use.  Figures are those of encoders and heads of text (encoder.py, heads.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from roundexport.calibration.images import drawn_pixels, folder_pixels
from roundexport.errors import UsageError
from roundexport.formats.package import PackageManifest
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.output_head import output_tensor

from .encoder import compare_vectors
from .heads import compare_logits
from .heldout import seed_for
from .report import EncoderQuality, HeadQuality

if TYPE_CHECKING:
    from roundexport.runtime.image_package import ImageClassifier, ImageEncoder

Pixels = NDArray[np.float32]
DRAWN = "pictures drawn here (dead leaves)"


def heldout_pixels(
    checkpoint: Checkpoint, manifest: PackageManifest, folder: str | Path | None, samples: int
) -> tuple[Pixels, str]:
    """Pixels of pictures, and what they are called.

    Args:
        checkpoint: the float model.
        manifest: the package's.
        folder: of pictures; None: drawn ones.
        samples: pictures wanted; fewer where the folder holds fewer.

    Raises:
        UsageError: not a folder of at least two pictures.
    """
    if folder is None:
        return drawn_pixels(checkpoint, samples, seed_for(manifest.source["calibration"])), DRAWN
    if not Path(folder).is_dir():
        raise UsageError(f"--text {folder}: this package reads images; give a folder of pictures")
    pixels = folder_pixels(checkpoint, Path(folder), samples)
    if len(pixels) < 2:
        raise UsageError(f"--text {folder}: figures with a standard error need two pictures")
    return pixels, Path(folder).name


def measure_images(
    checkpoint: Checkpoint, engine: ImageEncoder | ImageClassifier, pixels: Pixels
) -> EncoderQuality | HeadQuality:
    """Figures of a package of images."""
    floats = _float_outputs(checkpoint, engine.manifest, pixels)
    if engine.manifest.task == "classify_image":
        found: Any = engine
        return compare_logits(list(floats.astype(np.float64)), list(found.logits(pixels).astype(np.float64)))
    encoder: Any = engine
    return compare_vectors(floats, encoder.embed_pixels(pixels))


def _float_outputs(checkpoint: Checkpoint, manifest: PackageManifest, pixels: Pixels) -> Pixels:
    """Vectors [n, D] or logits [n, labels] of the float model, pooled as the package does."""
    import torch

    model, mode = checkpoint.load_model(), manifest.pooling["mode"] if manifest.pooling else None
    found = []
    with torch.no_grad():
        for one in torch.from_numpy(pixels):
            values = output_tensor(model(pixel_values=one[None]), vector=mode == "head")
            if mode in ("cls", "mean"):
                values = values[:, 0] if mode == "cls" else values.mean(1)
            found.append(values[0].numpy())
    return np.stack(found)
