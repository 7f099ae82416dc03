"""Samples out of WAV files: integers of 8, 16, 24 and 32 bits, floats of 32 and 64; channels are averaged.

A file is ``RIFF size WAVE`` and then chunks, ``name u32`` and as many bytes, padded to an even number.  ``fmt `` says
how samples are stored, ``data`` holds them; the others are skipped.  Programs that write into a pipe do not know the
length beforehand and leave zero or the largest number there: all that follows is then taken to be samples.

    8 bits: (x − 128) / 128        16, 24, 32 bits: x / 2^(bits−1)        floats: as they are

The standard library's `wave` reads neither floats nor, before Python 3.12, the extensible header that many
recorders write; both are a few lines here.  Compressed sound (MP3, FLAC, Opus, µ-law) is refused.

Source: Microsoft's Multimedia Programming Interface and Data Specifications 1.0; RFC 2361.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import UsageError
from roundexport.runtime.types import Floats

RATES = (1000, 192_000)
"""Samples per second that are believed."""

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_UNKNOWN = (0, 0xFFFFFFFF)
_OTHERS = {b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3": "MP3", b"\xff\xfb": "MP3", b"RIFX": "big-endian RIFX"}


@dataclass(frozen=True)
class Sound:
    """One channel of sound.

    Args:
        samples: float32 [n], full scale is 1.
        rate: samples per second.
    """

    samples: Floats
    rate: int

    def __post_init__(self) -> None:
        if self.samples.ndim != 1:
            raise UsageError(f"samples must be of one channel [n], not of shape {self.samples.shape}")
        if not RATES[0] <= self.rate <= RATES[1]:
            raise UsageError(f"{self.rate} samples per second cannot be right; it should be {RATES[0]} to {RATES[1]}")
        if not np.isfinite(self.samples).all():
            raise UsageError("the sound has samples that are not numbers (NaN or infinite)")

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / self.rate


@dataclass(frozen=True)
class _Form:
    """How samples are stored: ``fmt ``."""

    kind: int
    channels: int
    rate: int
    bits: int


def read_wav(source: str | Path | bytes, called: str = "") -> Sound:
    """Read a WAV file.

    Args:
        source: a path, or the file's bytes.
        called: what messages call bytes; a path is called by its name.

    Returns:
        Its sound, channels averaged.

    Raises:
        UsageError: the file is missing, not a WAV file, cut off, or stores samples in another way.
    """
    if isinstance(source, bytes):
        return _sound(source, called or "the sound")
    try:
        data = Path(source).read_bytes()
    except OSError as error:
        raise UsageError(f"{source}: cannot be read: {error.strerror or error}") from error
    return _sound(data, str(source))


def _sound(data: bytes, where: str) -> Sound:
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        other = next((name for start, name in _OTHERS.items() if data.startswith(start)), None)
        found = f"it is {other}" if other else "it does not begin with RIFF … WAVE"
        raise UsageError(f"{where}: not a WAV file, {found}; convert it: ffmpeg -i {where} -ar 16000 -ac 1 speech.wav")
    form = None
    for name, content in _chunks(data, where):
        if name == b"fmt ":
            form = _form(content, where)
        elif name == b"data":
            if form is None:
                raise UsageError(f"{where}: samples come before the chunk 'fmt ' that says what they are")
            return Sound(_samples(content, form, where), form.rate)
    raise UsageError(f"{where}: no chunk 'data'; the file has no samples or is cut off")


def _chunks(data: bytes, where: str) -> Iterator[tuple[bytes, memoryview]]:
    """Name and content of every chunk."""
    whole, place = memoryview(data), 12
    while place + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, place)
        place += 8
        if name == b"data" and size in _UNKNOWN:
            size = len(data) - place
        if place + size > len(data):
            raise UsageError(f"{where}: cut off: chunk {name!r} should have {size} bytes, it has {len(data) - place}")
        yield name, whole[place : place + size]
        place += size + size % 2


def _form(content: memoryview, where: str) -> _Form:
    if len(content) < 16:
        raise UsageError(f"{where}: the chunk 'fmt ' has {len(content)} bytes, at least 16 are needed")
    kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", content)
    if kind == _EXTENSIBLE and len(content) >= 26:
        (kind,) = struct.unpack_from("<H", content, 24)
    if (kind, bits) not in ((_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32), (_FLOAT, 64)):
        raise UsageError(
            f"{where}: samples of format {kind} with {bits} bits; read are integers of 8, 16, 24, 32 bits and floats "
            "of 32, 64: convert it, ffmpeg -i IN -ar 16000 -ac 1 -c:a pcm_s16le speech.wav"
        )
    if channels < 1:
        raise UsageError(f"{where}: the file says it has {channels} channels")
    if not RATES[0] <= rate <= RATES[1]:
        raise UsageError(f"{where}: {rate} samples per second cannot be right; it should be {RATES[0]} to {RATES[1]}")
    return _Form(kind, channels, rate, bits)


def _samples(content: memoryview, form: _Form, where: str) -> Floats:
    """Samples [n] of one channel; an incomplete last moment is left out."""
    moment = form.channels * form.bits // 8
    content = content[: len(content) // moment * moment]
    if not content:
        raise UsageError(f"{where}: the file has no samples")
    found: NDArray[np.float32]
    if form.kind == _FLOAT:
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused with the infinite
            found = np.frombuffer(content, f"<f{form.bits // 8}").astype(np.float32)
    elif form.bits == 8:
        found = (np.frombuffer(content, np.uint8).astype(np.float32) - np.float32(128)) / np.float32(128)
    elif form.bits == 24:
        wide = np.zeros((len(content) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(content, np.uint8).reshape(-1, 3)
        found = wide.view("<i4")[:, 0].astype(np.float32) / np.float32(2**31)
    else:
        found = np.frombuffer(content, f"<i{form.bits // 8}").astype(np.float32) / np.float32(2 ** (form.bits - 1))
    return found if form.channels == 1 else found.reshape(-1, form.channels).mean(1, dtype=np.float32)
