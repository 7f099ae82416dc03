"""Held-out text: what a package is judged on, which must be disjoint from what it was calibrated on.

Where no file is given, it is the text of this package, `heldout.txt`: passages of seven novels in the public domain,
92 KB, none of them in calibration/bundled.txt, of which calibration's default takes a part
(tests/verification/test_heldout.py).  Text that the model writes has no file in common with it.
A text is cut into windows of tokens (decoders) or read line by line (encoders).  Where the package knows which file it
was calibrated on, that file is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.calibration.images import picture_files
from roundexport.calibration.mixture import file_digests
from roundexport.calibration.text import cut_samples, encoder_of
from roundexport.calibration.waveforms import wav_files
from roundexport.errors import UsageError
from roundexport.formats.package import PackageManifest
from roundexport.model.checkpoint import Checkpoint
from roundexport.progress import Progress
from roundexport.storage.checksums import sha256_file
from roundexport.storage.tensor_cache import key_of
from roundexport.types import FROM_FILES, OF_IMAGES, Task

BUNDLED = Path(__file__).with_name("heldout.txt")
BUNDLED_NAME = "bundled text"
HELDOUT_SEED = 20_001
"""Seed of text drawn for verification, unless calibration used it; calibration's default is 42."""


def heldout_ids(
    checkpoint: Checkpoint,
    manifest: PackageManifest,
    text: str | Path | None,
    samples: int,
    length: int,
    shown: Progress,
) -> tuple[NDArray[np.int64], str]:
    """Windows of a text, and what it is called.

    Args:
        checkpoint: the model, whose tokenizer is used.
        manifest: the package's.
        text: the file; None: the bundled text, or, where the model has no tokenizer, text that it writes.
        samples: windows wanted; fewer are taken where the text ends.
        length: tokens per window.
        shown: where progress is shown.

    Raises:
        UsageError: the text cannot be read, or has less than two windows, or windows would have one token.
    """
    if length < 2:
        raise UsageError(f"windows of {length} token predict nothing; the package takes {manifest.max_context} tokens")
    if text is None and not has_tokenizer(checkpoint):
        from roundexport.calibration.samples import load_calibration

        seed = seed_for(manifest.source["calibration"])
        with shown.stage("the float model writes held-out text") as stage:
            drawn = load_calibration(
                checkpoint, "self", num_samples=samples, sample_len=length, seed=seed, report=stage.at, say=shown.say
            )
        return drawn.ids.astype(np.int64, copy=False), "sampled from the float model, which has no tokenizer"
    path = Path(text or BUNDLED)
    with shown.stage(f"cutting held-out {path.name} into windows"):
        ids = cut_samples(
            encoder_of(checkpoint), lambda _: read_heldout(path), f"held-out {path.name}", samples, length
        )
    if len(ids) < 2:
        raise UsageError(
            f"held-out {path.name}: found one window of {length} tokens; figures with a standard error need two; "
            "give a longer --text, or a smaller --sample-len"
        )
    return ids, BUNDLED_NAME if text is None else path.name


def heldout_texts(text: str | Path | None, samples: int) -> tuple[list[str], str]:
    """Lines of a text, the bundled one where there is no other, and what it is called.

    Raises:
        UsageError: the text cannot be read, or has too few lines.
    """
    path = Path(text or BUNDLED)
    lines = [line.strip() for line in read_heldout(path).split("\n") if len(line.split()) >= 5]
    if len(lines) < 8:
        raise UsageError(f"{path}: found {len(lines)} lines of at least five words; at least 8 are needed")
    return lines[:: max(1, len(lines) // samples)][:samples], BUNDLED_NAME if text is None else path.name


def read_heldout(text: str | Path) -> str:
    """The held-out text.

    Raises:
        UsageError: it cannot be read as UTF-8 text.
    """
    try:
        return Path(text).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {text}: the held-out text cannot be read: {error}") from error


def heldout_digest(text: str | Path | None, shown: Progress) -> str | None:
    """Held-out text by what is in it, a folder by its files; None: the one that comes with this package.

    Args:
        text: the file, or the folder.
        shown: where progress is shown.

    Raises:
        UsageError: there is nothing of that name.
    """
    if text is None:
        return None
    path = Path(text)
    if not path.exists():
        raise UsageError(f"held-out text {text} cannot be read: it does not exist")
    with shown.stage(f"hashing held-out {path.name}"):
        if not path.is_dir():
            return sha256_file(path)
        return key_of(files={entry.name: sha256_file(entry) for entry in sorted(path.iterdir()) if entry.is_file()})


def check_heldout(task: Task, text: str | Path | None) -> None:
    """Refuse what verification could not read, before anything is tuned.

    Raises:
        UsageError: no UTF-8 text; for a model that hears, no folder with sounds.
    """
    if task in ("transcribe", "ctc"):
        if text is None or not any(Path(text).glob("*.wav")):
            given = "" if text is None else f" {text}"
            raise UsageError(
                f"--text{given}: this model hears, and what it lost is measured on sounds: give a folder of .wav files "
                "with speech that --calibration does not have"
            )
    elif text is not None and task not in FROM_FILES:
        read_heldout(text)


def check_disjoint(manifest: PackageManifest, text: str | Path | None) -> None:
    """Refuse a text that cannot be read, or that the package was calibrated on; of a folder, any file of it."""
    known = file_digests(manifest.source["calibration"])
    if manifest.task in FROM_FILES:
        seen = manifest.task in OF_IMAGES
        files = () if text is None or not known else picture_files(text) if seen else wav_files(text)
        again = [path.name for path in files if sha256_file(path) in known]
        if again:
            raise UsageError(
                f"--text {text}: this package was calibrated on {', '.join(again[:5])}"
                f"{f' and {len(again) - 5} more' if len(again) > 5 else ''} of these "
                f"{'pictures' if seen else 'sounds'}; give others"
            )
        return
    read_heldout(text or BUNDLED)
    if sha256_file(Path(text or BUNDLED)) in known:
        name = "the bundled held-out text" if text is None else f"--text {text}"
        raise UsageError(f"{name} is text that this package was calibrated on; give held-out text with --text")


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether the model reads text; one without a tokenizer is given what it writes itself."""
    try:
        encoder_of(checkpoint)
    except UsageError:
        return False
    return True


def seed_for(calibration: dict[str, Any]) -> int:
    """Seed of what is drawn for verification: another than calibration's."""
    return HELDOUT_SEED + (calibration.get("seed") == HELDOUT_SEED)
