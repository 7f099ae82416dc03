"""What a model that reads samples is given of a sound: its samples, as they are or of mean 0 and variance 1.

    do_normalize     (x - mean(x)) / sqrt(var(x) + 1e-7)        over the whole sound

That is what transformers' Wav2Vec2FeatureExtractor gives for one sound.  Rate and normalization are read from
``preprocessor_config.json``, or from ``feature_extractor`` in ``processor_config.json``.  A frame of the model takes as
many samples as its convolutions' strides multiply to.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from roundexport.errors import ArtifactError, UnsupportedError
from roundexport.runtime.tokenizer import read_json
from roundexport.runtime.types import Floats
from roundexport.storage.paths import ListedFiles

KIND = "Wav2Vec2FeatureExtractor"
FILE, PROCESSOR = "preprocessor_config.json", "processor_config.json"
_EPS = 1e-7


@dataclass(frozen=True)
class Waveform:
    """How samples are prepared.

    Args:
        sampling_rate: samples per second.
        do_normalize: a sound gets mean 0 and variance 1.
    """

    sampling_rate: int = 16_000
    do_normalize: bool = True

    def __call__(self, samples: Floats) -> Floats:
        """Prepared samples of one sound [T], float32."""
        if not self.do_normalize:
            return samples.astype(np.float32)
        x = samples.astype(np.float32)
        normed: Floats = (x - x.mean()) / np.sqrt(x.var() + np.float32(_EPS))
        return normed


def read_waveform(folder: Path, listed: Collection[str] | None = None) -> Waveform:
    """What a folder's files say; transformers' defaults where there is no file.

    Args:
        folder: package or model folder.
        listed: files that the package's manifest lists, which alone are read; None: all.

    Raises:
        ArtifactError: a value makes no sense.
        UnsupportedError: another preparation.
    """
    files, where = ListedFiles(folder, listed), folder / FILE
    found = read_json(files.find(FILE))
    if not found:
        where = folder / PROCESSOR
        found = read_json(files.find(PROCESSOR)).get("feature_extractor", {})
    if not isinstance(found, dict):
        raise ArtifactError(f"{where}: feature_extractor must be an object, not {found!r:.80}")
    kind = found.get("feature_extractor_type", KIND)
    if kind != KIND:
        raise UnsupportedError(f"{where}: samples are prepared by {kind}; only {KIND} is computed here")
    rate, normalize = found.get("sampling_rate", 16_000), found.get("do_normalize", True)
    if not isinstance(rate, int) or isinstance(rate, bool) or not 1000 <= rate <= 192_000:
        raise ArtifactError(f"{where}: sampling_rate must be a whole number from 1000 to 192000, not {rate!r}")
    if not isinstance(normalize, bool):
        raise ArtifactError(f"{where}: do_normalize must be true or false, not {normalize!r}")
    return Waveform(rate, normalize)


def frames_of(config: Mapping[str, Any], samples: int) -> int:
    """Frames that a model's convolutions make of so many samples; 0 where these are too few for one.

    Args:
        config: config.json, held against :func:`frame_size` before.
        samples: of a sound.
    """
    for kernel, stride in zip(config["conv_kernel"], config["conv_stride"], strict=True):
        samples = (samples - kernel) // stride + 1
        if samples < 1:
            return 0
    return samples


def least_samples(config: Mapping[str, Any]) -> int:
    """Samples of the first frame."""
    least = 1
    for kernel, stride in zip(reversed(config["conv_kernel"]), reversed(config["conv_stride"]), strict=True):
        least = (least - 1) * int(stride) + int(kernel)
    return least


def frame_size(config: Mapping[str, Any], where: object) -> int:
    """Samples from one frame of the model to the next.

    Raises:
        ArtifactError: config.json does not say.
        UnsupportedError: an adapter makes fewer frames of those of the convolutions.
    """
    if config.get("add_adapter"):
        raise UnsupportedError(
            f"{where}: add_adapter of config.json: an adapter behind the encoder joins frames, so that none has the "
            "time that it is read at; only models without one are written down here"
        )
    for key in ("conv_stride", "conv_kernel"):
        values = config.get(key)
        if not isinstance(values, list) or not all(isinstance(one, int) and one > 0 for one in values) or not values:
            raise ArtifactError(f"{where}: {key} of config.json must list whole numbers above 0, not {values!r:.80}")
    if len(config["conv_stride"]) != len(config["conv_kernel"]):
        raise ArtifactError(f"{where}: conv_stride and conv_kernel of config.json differ in length")
    return prod(config["conv_stride"])
