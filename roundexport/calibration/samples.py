"""Calibration: the token ids that tuning sees, from a text file, a Hugging Face dataset, or the model itself.

A model of images sees pixels instead, see images.py.

    FILE               one stream of text, cut into samples of equal length; the first num_samples are used
    owner/name[:config]  the same from a dataset's training split, records joined by blank lines; the column is the
                       first there is of text, content, document; needs the `datasets` package
    self               nothing to download: a decoder writes its own samples, by ancestral sampling at temperature 1
                       from its beginning-of-sequence token, which draws from the very distribution that has to survive.
                       An encoder cannot write, so its samples are words drawn from its vocabulary with Zipf's law
                       (p ∝ 1/(rank + 2.7), ranks by token id: vocabularies list frequent pieces first)

Every sample is framed as the model's tokenizer frames a text ([CLS] … [SEP], a leading <bos>) where it does.  There is
no padding: a text shorter than one sample is refused.  ``sample_len`` is cut to the positions the model has.

The identity (kind, sha256 of the ids, counts, seed, sha256 of a file's text) goes into the artifact's manifest, so that
a result can be traced and held-out text be told from calibration text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import UsageError
from roundexport.model.positions import max_positions
from roundexport.types import OF_IMAGES, PAIRS

from .dataset import HUB_ID, dataset_text
from .images import Pixels, calibration_pixels, pixels_digest
from .self_generated import Writer, written_samples
from .sounds import sounds
from .text import cut_samples, encoder_of, read_text, text_digest
from .vocabulary import vocabulary_samples

if TYPE_CHECKING:
    import torch

    from roundexport.model.checkpoint import Checkpoint

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token ids or pixels, and where they are from.

    Args:
        ids: int64 [samples, length], or of a model of images float32 [samples, C, height, width].
        identity: what goes into a manifest: kind, sha256 of the ids, samples, length, seed and more by kind.
        notes: what a user should know, such as fewer samples than asked for.
        features: of a model that hears, what its encoder is given, [samples, mels, frames].
    """

    ids: Ids | Pixels
    identity: dict[str, Any]
    notes: tuple[str, ...] = ()
    features: NDArray[np.float32] | None = None


def load_calibration(  # noqa: PLR0913  (what is asked for, what is at hand, and where to tell)
    checkpoint: Checkpoint,
    source: str,
    *,
    num_samples: int = 128,
    sample_len: int = 512,
    seed: int = 42,
    model: torch.nn.Module | None = None,
    writer: Writer | None = None,
    report: Callable[[float, str], None] = lambda share, where: None,
    say: Callable[[str], None] = lambda text: None,
    fits: Callable[[], None] = lambda: None,
) -> Calibration:
    """Get calibration samples.

    Args:
        checkpoint: the model, whose tokenizer is used.
        source: ``self``, a text file, or a Hugging Face dataset id ``owner/name`` or ``owner/name:config``; of a model
            of images ``self`` or a folder of pictures.
        num_samples: samples wanted; fewer are taken where the text ends.
        sample_len: tokens per sample, special tokens included; cut to the model's positions.
        seed: seed of what ``self`` draws.
        model: the loaded model, where the caller has it already; ``self`` loads it otherwise.
        writer: what writes in place of the model where that is faster.
        report: called with the share of the writing that is done, and where it is.
        say: called with what a user should know at once, such as a writer that cannot write.
        fits: called before the model, loaded whole, writes; raises where it does not fit in memory.

    Returns:
        The samples.

    Raises:
        UsageError: no such file, a dataset that cannot be had, or less text than one sample.
    """
    if num_samples < 1 or sample_len < 8:
        raise UsageError(f"calibration needs at least 1 sample of 8 tokens, not {num_samples} of {sample_len}")
    if checkpoint.task in OF_IMAGES:
        pixels, known, told = calibration_pixels(checkpoint, source, num_samples, seed)
        if len(pixels) < num_samples:
            told = (*told, f"{source} holds {len(pixels)} pictures; {num_samples} were asked for")
        shown = {"pixels_sha256": pixels_digest(pixels), "num_samples": len(pixels), "seed": seed}
        return Calibration(pixels, {**known, **shown}, told)
    length = min(sample_len, max_positions(checkpoint))
    notes = [] if length == sample_len else [f"samples are cut to the {length} positions of the model"]
    if checkpoint.task in PAIRS:
        fits()
        return _answered(checkpoint, source, num_samples, length, seed, model, report, notes)
    if source == "self":
        if checkpoint.task != "generate":
            ids = vocabulary_samples(checkpoint, num_samples, length, seed)
            identity = {"kind": "vocabulary", "source": "token ids drawn with p ~ 1/(rank + 2.7), ranked by id"}
        else:
            written = written_samples(
                checkpoint,
                num_samples,
                length,
                seed,
                model=model,
                writer=writer,
                report=report,
                say=say,
                fits=fits,
            )
            ids, identity = written.ids, {"kind": "self", **written.identity}
    else:
        ids, identity = _from_text(checkpoint, source, num_samples, length)
    if len(ids) < num_samples:
        notes.append(f"{source} holds {len(ids)} samples of {length} tokens; {num_samples} were asked for")
    return Calibration(ids, {**identity, **_identity(ids, seed)}, tuple(notes))


def _answered(
    checkpoint: Checkpoint,
    source: str,
    num_samples: int,
    length: int,
    seed: int,
    model: torch.nn.Module | None,
    report: Callable[[float, str], None],
    notes: list[str],
) -> Calibration:
    """Sources with the model's own answers."""
    import torch

    from .answers import answers_to

    features = sounds(checkpoint, source, num_samples)
    if features is not None:
        sources, identity = {"input_features": torch.from_numpy(features)}, {"kind": "sounds"}
        own = np.empty((len(features), 0), np.int64)
    else:
        if source == "self":
            own, identity = vocabulary_samples(checkpoint, num_samples, length, seed), {"kind": "vocabulary"}
        else:
            own, identity = _from_text(checkpoint, source, num_samples, length)
        sources = {"input_ids": torch.from_numpy(own)}
    answers = answers_to(model or checkpoint.load_model(), checkpoint, sources, length - 1, seed, report)
    ids = np.concatenate([own, answers], 1)
    identity = {**identity, "answers": "sampled from the model at temperature 1", **_identity(ids, seed)}
    return Calibration(ids, identity, tuple(notes), features)


def ids_digest(ids: Ids) -> str:
    """The sha256 of token ids as little-endian int64, row by row."""
    return hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes()).hexdigest()


def _identity(ids: Ids, seed: int) -> dict[str, Any]:
    return {"ids_sha256": ids_digest(ids), "num_samples": len(ids), "sample_len": ids.shape[1], "seed": seed}


def _from_text(checkpoint: Checkpoint, source: str, num_samples: int, length: int) -> tuple[Ids, dict[str, Any]]:
    encode, path, called = encoder_of(checkpoint), Path(source), f"calibration {source}"
    if path.is_file():
        identity = {"kind": "text", "file": path.name, "text_sha256": text_digest(path)}
        return cut_samples(encode, lambda _: read_text(path), called, num_samples, length), identity
    if HUB_ID.fullmatch(source):
        identity = {"kind": "dataset", "dataset": source}
        return cut_samples(encode, lambda chars: dataset_text(source, chars), called, num_samples, length), identity
    raise UsageError(
        f"calibration {source!r}: there is no such file, and it is not a Hugging Face dataset id (owner/name); "
        "give one of these, or self"
    )
