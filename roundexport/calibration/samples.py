"""Calibration: the token ids that tuning sees, from text, a Hugging Face dataset, the model itself, or several of them.

A model of images sees pixels instead, see images.py.

    FILE               one stream of text, cut into samples of equal length; the first num_samples are used
    FILE.jsonl         records: texts, joined by blank lines, or conversations through the model's chat template,
                       see records.py and chat.py
    owner/name[:config]  the same from a dataset's training split; needs the `datasets` package
    self               nothing to download: a decoder writes its own samples, by ancestral sampling at temperature 1
                       from its beginning-of-sequence token, which draws from the very distribution that has to survive;
                       a chat model begins every other one with a user's turn, see self_generated.py.
                       An encoder cannot write, so its samples are words drawn from its vocabulary with Zipf's law
                       (p ∝ 1/(rank + 2.7), ranks by token id: vocabularies list frequent pieces first)
    A:0.75,B:0.25      any of these by shares of the samples, interleaved, see mixture.py
    auto               the default: self, in halves with the bundled text where a decoder can read it, see chosen.py

Every sample of a text is framed as the model's tokenizer frames one ([CLS] … [SEP], a leading <bos>) where it does.
There is no padding: a text shorter than one sample is refused.  ``sample_len`` is cut to the positions the model has.

The identity (kind, sha256 of the ids, counts, seed, sha256 of a file's text; of a mixture also every part's own) goes
into the artifact's manifest, so that a result can be traced and held-out text be told from calibration text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import UsageError
from roundexport.model.positions import max_positions
from roundexport.storage.checksums import sha256_file
from roundexport.types import OF_IMAGES, PAIRS

from .chat import packed_samples, plain_text, template_of
from .chosen import chosen_source
from .dataset import HUB_ID, dataset_records
from .images import Pixels, calibration_pixels, pixels_digest
from .mixture import SELF, Part, counts_of, interleaved, parts_of
from .records import SUFFIXES, Record, Records, joined_texts, read_lines
from .self_generated import Writer, written_samples
from .sounds import sounds
from .text import cut_samples, encoder_of, read_text, text_digest
from .vocabulary import vocabulary_samples
from .waveforms import samples_digest, sound_windows, wav_files

if TYPE_CHECKING:
    import torch

    from roundexport.model.checkpoint import Checkpoint

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token ids or pixels, and where they are from.

    Args:
        ids: int64 [samples, length], of a model of images float32 [samples, C, height, width], of one
            that reads samples float32 [windows, T].
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
        source: ``auto``, ``self``, a text file, a .jsonl file, a Hugging Face dataset id ``owner/name`` or
            ``owner/name:config``, or several of them with their shares, as in ``a.txt:0.75,b.txt:0.25``; of a model
            of images ``auto``, ``self`` or a folder of pictures.
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
        UsageError: no such file, a dataset that cannot be had, less text than one sample, or than a mixture's share.
    """
    if num_samples < 1 or sample_len < 8:
        raise UsageError(f"calibration needs at least 1 sample of 8 tokens, not {num_samples} of {sample_len}")
    source = chosen_source(checkpoint, source, num_samples, sample_len)
    if checkpoint.task in OF_IMAGES:
        pixels, known, told = calibration_pixels(checkpoint, source, num_samples, seed)
        if len(pixels) < num_samples:
            told = (*told, f"{source} holds {len(pixels)} pictures; {num_samples} were asked for")
        shown = {"pixels_sha256": pixels_digest(pixels), "num_samples": len(pixels), "seed": seed}
        return Calibration(pixels, {**known, **shown}, told)
    if checkpoint.task == "ctc":
        heard, files = sound_windows(checkpoint, source, num_samples, sample_len)
        told = (f"{source} holds {len(heard)} windows; {num_samples} were asked for",)
        shown = {"samples_sha256": samples_digest(heard), "num_samples": len(heard), "samples_each": heard.shape[1]}
        identity = {"kind": "sounds", "folder": Path(source).name, **_digests_of(files), **shown}
        return Calibration(heard, identity, told if len(heard) < num_samples else ())
    length = min(sample_len, max_positions(checkpoint))
    notes = [] if length == sample_len else [f"samples are cut to the {length} positions of the model"]
    asked = _Asked(checkpoint, length, seed, model, writer, report, say, fits)
    if checkpoint.task in PAIRS:
        fits()
        found = _answered(asked, source, num_samples)
    else:
        found = _texts(asked, source, num_samples)
        if len(found.ids) < num_samples:
            notes.append(f"{source} holds {len(found.ids)} samples of {length} tokens; {num_samples} were asked for")
    return Calibration(
        found.ids, {**found.identity, **_identity(found.ids, seed)}, (*notes, *found.notes), found.features
    )


@dataclass(frozen=True, eq=False)
class _Asked:
    """What every source is asked for, and what is at hand; see :func:`load_calibration`."""

    checkpoint: Checkpoint
    length: int
    seed: int
    model: torch.nn.Module | None
    writer: Writer | None
    report: Callable[[float, str], None]
    say: Callable[[str], None]
    fits: Callable[[], None]


@dataclass(frozen=True, eq=False)
class _Drawn:
    """Samples of a source, with what its kind of source adds to the identity; else as `Calibration`."""

    ids: Ids
    identity: dict[str, Any]
    notes: tuple[str, ...] = ()
    features: NDArray[np.float32] | None = None


def _answered(asked: _Asked, source: str, num_samples: int) -> _Drawn:
    """Sources with the model's own answers."""
    import torch

    from .answers import answers_to

    checkpoint = asked.checkpoint
    features = sounds(checkpoint, source, num_samples)
    if features is not None:
        sources = {"input_features": torch.from_numpy(features)}
        known = {"kind": "sounds", **_digests_of(wav_files(source)[: len(features)])}
        own = _Drawn(np.empty((len(features), 0), np.int64), known)
    else:
        own = _texts(asked, source, num_samples)
        sources = {"input_ids": torch.from_numpy(own.ids)}
    model = asked.model or checkpoint.load_model()
    answers = answers_to(model, checkpoint, sources, asked.length - 1, asked.seed, asked.report)
    identity = {**own.identity, "answers": "sampled from the model at temperature 1"}
    return _Drawn(np.concatenate([own.ids, answers], 1), identity, own.notes, features)


def _texts(asked: _Asked, source: str, num_samples: int) -> _Drawn:
    """Token ids of one source or of a mixture; what is in every identity is not yet in this one."""
    parts = parts_of(source)
    if len(parts) == 1:
        return _part(asked, parts[0].source, num_samples)
    counts = counts_of(parts, num_samples)
    drawn = [_whole_part(asked, part, count) for part, count in zip(parts, counts, strict=True)]
    told = [
        {**found.identity, "share": part.share, "num_samples": count, "ids_sha256": ids_digest(found.ids)}
        for part, count, found in zip(parts, counts, drawn, strict=True)
    ]
    ids = np.concatenate([found.ids for found in drawn])[interleaved(counts)]
    return _Drawn(ids, {"kind": "mixture", "parts": told}, tuple(note for found in drawn for note in found.notes))


def _whole_part(asked: _Asked, part: Part, count: int) -> _Drawn:
    """A part of a mixture, which must fill its share: with less of it the shares would be others than asked for."""
    found = _part(asked, part.source, count)
    if len(found.ids) < count:
        raise UsageError(
            f"calibration {part.source}: holds {len(found.ids)} samples of {asked.length} tokens, and its share of "
            f"{part.share:g} takes {count}; give more of it, a smaller share, or ask for fewer samples (--num-samples)"
        )
    return found


def _part(asked: _Asked, source: str, num_samples: int) -> _Drawn:
    """Token ids of one source."""
    if source != SELF:
        return _from_text(asked.checkpoint, source, num_samples, asked.length)
    if asked.checkpoint.task != "generate":
        ids = vocabulary_samples(asked.checkpoint, num_samples, asked.length, asked.seed)
        return _Drawn(ids, {"kind": "vocabulary", "source": "token ids drawn with p ~ 1/(rank + 2.7), ranked by id"})
    written = written_samples(
        asked.checkpoint, num_samples, asked.length, asked.seed,
        model=asked.model, writer=asked.writer, report=asked.report, say=asked.say, fits=asked.fits,
    )  # fmt: skip
    return _Drawn(written.ids, {"kind": "self", **written.identity})


def _digests_of(sounds: Sequence[Path]) -> dict[str, list[str]]:
    return {"sounds_sha256": sorted({sha256_file(path) for path in sounds})}


def ids_digest(ids: Ids) -> str:
    """The sha256 of token ids as little-endian int64, row by row."""
    return hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes()).hexdigest()


def _identity(ids: Ids, seed: int) -> dict[str, Any]:
    return {"ids_sha256": ids_digest(ids), "num_samples": len(ids), "sample_len": ids.shape[1], "seed": seed}


def _from_text(checkpoint: Checkpoint, source: str, num_samples: int, length: int) -> _Drawn:
    path, called = Path(source), f"calibration {source}"
    if path.is_file():
        identity = {"kind": "text", "file": path.name, "text_sha256": text_digest(path)}
        if path.suffix in SUFFIXES:
            return _from_records(checkpoint, read_lines(path, called), identity, called, num_samples, length)
        ids = cut_samples(encoder_of(checkpoint), lambda _: read_text(path), called, num_samples, length)
        return _Drawn(ids, identity)
    if HUB_ID.fullmatch(source):
        identity = {"kind": "dataset", "dataset": source}
        return _from_records(checkpoint, dataset_records(source), identity, called, num_samples, length)
    raise UsageError(
        f"calibration {source!r}: there is no such file, and it is not a Hugging Face dataset id (owner/name); "
        "give one of these, self, or several with their shares, as in a.txt:0.75,b.txt:0.25"
    )


def _from_records(
    checkpoint: Checkpoint,
    records: Iterator[Record],
    identity: dict[str, Any],
    called: str,
    num_samples: int,
    length: int,
) -> _Drawn:
    encode, found = encoder_of(checkpoint), Records(called, records)
    if not found.conversations:
        ids = cut_samples(encode, lambda chars: joined_texts(found.texts(), chars), called, num_samples, length)
        return _Drawn(ids, identity)
    template = template_of(checkpoint)
    if template is not None:
        ids = packed_samples(encode, template.texts(found.messages(), called), called, num_samples, length)
        return _Drawn(ids, {**identity, "chat_template": template.digest})
    texts = map(plain_text, found.messages())
    ids = cut_samples(encode, lambda chars: joined_texts(texts, chars), called, num_samples, length)
    note = f"{checkpoint.location} has no chat template: the conversations of {called} are read as plain text"
    return _Drawn(ids, {**identity, "chat_template": "none"}, (note,))
