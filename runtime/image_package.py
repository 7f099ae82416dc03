"""Vectors and labels for pictures: prepare (images.py), run the encoder in batches, take or pool its vector.

    head   v = what the model itself makes of its hidden states, the graph's second output
    cls    v = h_0                          mean   v = Σ_t h_t / S

A package is made for images of one size; pixels of another are refused.  Whoever has pixels already leaves the
preparation out: `embed_pixels` and `logits` take arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from roundexport.errors import UnsupportedError, UsageError
from roundexport.formats.package import PackageManifest
from roundexport.storage.paths import ListedFiles

from .classifying import Classified, classified
from .encoder_package import EncoderPackage
from .images import FILE, Preprocessor, read_preprocessor
from .labels import read_labels
from .tokenizer import read_json
from .types import EncoderBackend, Floats

if TYPE_CHECKING:
    from PIL.Image import Image

    from .images import Bytes


class ImagePackage(EncoderPackage):
    """A package that reads images, opened; see :class:`EncoderPackage`."""

    def __init__(self, backend: EncoderBackend, manifest: PackageManifest, folder: Path) -> None:
        super().__init__(backend, manifest, folder)
        self._files = ListedFiles(folder, manifest.files)
        self._prepared: Preprocessor | None = None

    @property
    def preprocessor(self) -> Preprocessor:
        """How pictures become pixels.

        Raises:
            UnsupportedError: the package does not say.
        """
        if self._prepared is None:
            path = self._files.find(FILE)
            if path is None:
                raise UnsupportedError(
                    f"{self._folder} has no {FILE}, so pictures cannot be prepared for it; give pixels: embed_pixels, "
                    "logits"
                )
            self._prepared = read_preprocessor(read_json(path), str(path))
        return self._prepared

    def pixels(self, pictures: Sequence[str | Path | Image | Bytes]) -> Floats:
        """Pixels [n, C, height, width] of pictures: files, Pillow images, or arrays [height, width, 3] of bytes.

        Raises:
            UsageError: one cannot be read, or there is none, or a single one instead of a list.
        """
        if isinstance(pictures, str | Path) or not len(pictures):
            raise UsageError("give a list of pictures; put a single one into a list")
        return np.stack([self.preprocessor(picture) for picture in pictures])

    def _batches(self, pixels: Floats, batch_size: int) -> Iterator[dict[str, Any]]:
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {batch_size}")
        if pixels.ndim != 4 or not len(pixels):
            raise UsageError(f"pixels are [images, channels, height, width], not {list(pixels.shape)}")
        for start in range(0, len(pixels), batch_size):
            yield {"pixel_values": np.ascontiguousarray(pixels[start : start + batch_size], np.float32)}


class ImageEncoder(ImagePackage):
    """An encoder of images."""

    def embed(self, pictures: Sequence[str | Path | Image | Bytes], batch_size: int = 8) -> Floats:
        """Vectors [n, D] of pictures.

        Args:
            pictures: files, Pillow images, or arrays [height, width, 3] of bytes.
            batch_size: pictures per run.

        Raises:
            UsageError: a picture cannot be read, or a batch size below 1.
        """
        return self.embed_pixels(self.pixels(pictures), batch_size)

    def embed_pixels(self, pixels: Floats, batch_size: int = 8) -> Floats:
        """Vectors [n, D] of pixels [n, C, height, width]."""
        mode = self.manifest.pooling["mode"] if self.manifest.pooling else "mean"
        found = []
        for inputs in self._batches(pixels, batch_size):
            values = self.output(inputs, vector=mode == "head")
            if mode != "head":
                values = values[:, 0] if mode == "cls" else values.mean(1)
            found.append(np.ascontiguousarray(values, np.float32))
        return np.concatenate(found)

    def hidden(self, pixels: Floats, batch_size: int = 8) -> Floats:
        """Last hidden states [n, S, H] of pixels [n, C, height, width]."""
        return np.concatenate([self.output(inputs) for inputs in self._batches(pixels, batch_size)])


class ImageClassifier(ImagePackage):
    """A classifier of images."""

    def __init__(self, backend: EncoderBackend, manifest: PackageManifest, folder: Path) -> None:
        super().__init__(backend, manifest, folder)
        self._labels = read_labels(read_json(self._files.find("config.json")), str(folder / "config.json"))

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, in the order of the logits."""
        return self._labels.names

    def logits(self, pixels: Floats, batch_size: int = 8) -> Floats:
        """Logits [n, labels] of pixels [n, C, height, width]."""
        return np.concatenate([self.output(inputs) for inputs in self._batches(pixels, batch_size)])

    def classify(self, pictures: Sequence[str | Path | Image | Bytes], batch_size: int = 8) -> list[Classified]:
        """Label and scores of pictures, as transformers' pipeline has them.

        Raises:
            UsageError: a picture cannot be read, or a batch size below 1.
        """
        return classified(self._labels, self.logits(self.pixels(pictures), batch_size))
