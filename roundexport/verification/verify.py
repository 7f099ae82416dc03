"""`verify`: what a package lost against the float model it came from, on its own runtime, over held-out text.

    package ─ files hashed ─ integers read back ─┐
    float model ─────────────────────────────────┤ decoder.py, encoder.py or heads.py ─ figures ─ gates.py
    text ─ heldout.py: windows or lines ─────────┘            (pair.py of an encoder with a decoder)

Text must be disjoint from calibration text; where the package knows what it was calibrated on, that file is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.calibration.sounds import sounds
from roundexport.environment.memory import MemoryLimit
from roundexport.errors import ArtifactError, UsageError
from roundexport.formats.package import PackageManifest, read_package, vision_manifest
from roundexport.formats.verification_record import write_record
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.model_config import hidden_width
from roundexport.model.parts import part_of
from roundexport.model.torch_threads import torch_threads
from roundexport.model.weight_bytes import WeightBytes
from roundexport.progress import Progress
from roundexport.targets.output_check import section_bytes
from roundexport.types import OF_IMAGES, PAIRS

from .activations import check_asked, logits_bytes, measure_activations
from .decoder import measure_decoder
from .encoder import measure_encoder
from .gates import Gates
from .heads import measure_head
from .heldout import (
    BUNDLED,
    BUNDLED_NAME,
    check_disjoint,
    check_heldout,
    has_tokenizer,
    heldout_digest,
    heldout_ids,
    heldout_texts,
)
from .images import heldout_pixels, measure_images
from .memory_need import Windows, verify_moments
from .pair import measure_pair
from .report import ActivationCost, Quality, QualityReport
from .sectioned import SectionedDecoder
from .sounds import measure_sounds


@torch_threads()
def verify(  # noqa: PLR0913  (the parameters are the verb's flags)
    package: str | Path,
    *,
    against: str | Path,
    artifact: str | Path | None = None,
    text: str | Path | None = None,
    num_samples: int = 16,
    sample_len: int = 512,
    max_kl: float | None = None,
    min_top1: float | None = None,
    min_cosine: float | None = None,
    precise: bool = False,
    properties: Mapping[str, str] | None = None,
    activations: bool = False,
    max_ram: float | None = None,
    progress: bool | Progress = True,
) -> QualityReport:
    """Compare a package, on its own runtime, with the float model it came from.

    Args:
        package: package folder; every file's hash is checked first.
        against: the float model.
        artifact: the artifact it was exported from; its integers are then read back from the package and compared.
        text: held-out text file; None: the one that comes with this package.  For a package of images a folder of
            pictures; None: pictures drawn here.
        num_samples: windows (decoders) or texts (encoders).
        sample_len: tokens per window.
        max_kl: gate on mean KL, nats per token (decoders), or over the labels of a head.
        min_top1: gate on agreement of the likeliest token or label, 0 to 1 (decoders, heads).
        min_cosine: gate on mean cosine (encoders).
        precise: run the runtime in float32 throughout, instead of with the settings it ships with.
        properties: what OpenVINO's plugin is told, in its own names, as ``KV_CACHE_PRECISION``; with ``precise`` too.
        activations: also measure what 8-bit activations cost each product of a decoder's package (activations.py).
        max_ram: GiB of memory to stay within.
        progress: report on stderr, or where to report.

    Returns:
        The figures; ``failures`` is empty when every gate held.  Unless ``precise`` or ``properties`` were given, they
        are also kept in the package, as ``verification.json``.

    Raises:
        ArtifactError: the package is damaged, was made from another model, or its integers differ from the artifact's.
        UsageError: the text cannot be read, is too short, or is the calibration text; a gate is not for this task; or
            OpenVINO has no such property or value; or ``activations`` with ``precise``.
        UnsupportedError: ``activations`` of a package that is no decoder, or whose products have one precision.
        WontFitError: it takes more than ``max_ram``.
    """
    folder, limit, gates = Path(package), MemoryLimit(max_ram), Gates(max_kl, min_top1, min_cosine)
    asked = Text(text, num_samples, sample_len)
    with Progress.of(progress) as shown:
        with shown.stage(f"checking the files of {folder}"):
            manifest = read_package(folder)
            gates.check(manifest.task)
            if activations:
                check_asked(folder, manifest, precise, properties or {})
            check_heldout(manifest.task, text)
            if vision_manifest(manifest) is not None:
                shown.say("note: the figures are of the language model on text; the image side was verified by itself")
            check_disjoint(manifest, text)
            checkpoint = _source(against, manifest, folder, shown, max_ram)
            _check_room(manifest, checkpoint, asked, limit, activations)
        checked = None
        if artifact is not None:
            with shown.stage("reading integers back"):
                checked = _check_integers(folder, manifest, Path(artifact))
        opening = Opening(precise, properties or {}, activations)
        found = _measure(folder, manifest, checkpoint, asked, opening, limit, shown)
    report = QualityReport(
        package=str(package),
        against=str(against),
        text=found.text,
        engine=found.engine,
        quality=found.quality,
        integers_checked=checked,
        failures=gates.failures(found.quality),
        activations=found.activations,
        text_sha256=heldout_digest(BUNDLED if found.text == BUNDLED_NAME else text, shown),
    )
    if not precise and not properties:  # a package's record is about the package as it ships
        write_record(folder, report.to_json())
    return report


@dataclass(frozen=True)
class Text:
    """Held-out text that is asked for: a file or None, windows or lines of it, and tokens per window.

    Raises:
        UsageError: one window, which has no standard error, or windows of one token, in which nothing is predicted.
    """

    path: str | Path | None
    num_samples: int
    sample_len: int

    def __post_init__(self) -> None:
        for name, why in (("num_samples", "for a standard error"), ("sample_len", "to predict one from another")):
            value = getattr(self, name)
            if type(value) is not int or value < 2:
                raise UsageError(f"{name} must be a whole number of at least 2 {why}, not {value!r}")


@dataclass(frozen=True)
class Opening:
    """How a package is opened.

    Args:
        precise: in float32 throughout.
        properties: of OpenVINO's plugin.
        activations: also once for every product whose activations are in eight bits.
    """

    precise: bool
    properties: Mapping[str, str]
    activations: bool = False


@dataclass(frozen=True)
class Measured:
    """Figures, the text's name, and what the engine says of itself."""

    quality: Quality
    text: str
    engine: dict[str, Any]
    activations: ActivationCost | None = None


def _check_room(
    manifest: PackageManifest, checkpoint: Checkpoint, text: Text, limit: MemoryLimit, activations: bool
) -> None:
    """Refuse a verification that takes too much memory."""
    from roundexport.runtime.sections import takes_sections

    windows, decodes = None, manifest.task == "generate"
    if decodes and (text.path is not None or has_tokenizer(checkpoint)):  # else it writes its text
        width = hidden_width(checkpoint.config)
        windows = Windows(text.num_samples, text.sample_len, width, manifest.vocab_size)
    package = sum(entry["size"] for entry in manifest.files.values())
    limit.check(
        "a verification",
        *verify_moments(package, WeightBytes.of(checkpoint), windows, decodes and takes_sections(manifest)),
        *([{"the package": package, "logits": logits_bytes(manifest.vocab_size)}] if activations else []),
        advice="use a machine with more memory, or fewer or shorter windows",
    )


def _measure(
    folder: Path,
    manifest: PackageManifest,
    checkpoint: Checkpoint,
    text: Text,
    opening: Opening,
    limit: MemoryLimit,
    shown: Progress,
) -> Measured:
    """Figures of a package by its task."""
    from roundexport.runtime.loading import load

    sections = section_bytes(manifest, limit) if manifest.task == "generate" else None
    if sections is not None:
        shown.say("note: the package does not fit in memory; it is scored section by section, and writes nothing")
        if opening.properties or opening.activations:
            asked = "no properties are set" if opening.properties else "activations are not measured"
            raise UsageError(f"{folder} does not fit in memory, and in sections {asked}")
        engine: Any = SectionedDecoder(folder, manifest, opening.precise, sections)
    else:
        with shown.stage(f"opening {folder}"):
            engine = load(folder, check_hashes=False, precise=opening.precise, properties=opening.properties)
    if manifest.task == "generate":
        length = min(text.sample_len, manifest.max_context)
        ids, source = heldout_ids(checkpoint, manifest, text.path, text.num_samples, length, shown)
        if len(ids) < text.num_samples:
            shown.say(f"note: {source} holds {len(ids)} windows of {length} tokens; {text.num_samples} were asked for")
        quality = measure_decoder(checkpoint, engine, ids, max_context=manifest.max_context, shown=shown)
        told = engine.info()
        del engine  # products are opened one at a time, and not beside it
        cost = _activations(folder, ids, manifest.vocab_size, shown) if opening.activations else None
        return Measured(quality, source, told, cost)
    if manifest.task in OF_IMAGES:
        with shown.stage("getting held-out pictures ready"):
            pixels, source = heldout_pixels(checkpoint, manifest, text.path, text.num_samples)
        with shown.stage(f"comparing {len(pixels)} images"):
            return Measured(measure_images(checkpoint, engine, pixels), source, engine.info())
    if manifest.task == "ctc":
        with shown.stage("comparing logits of held-out sounds"):
            lost = measure_sounds(checkpoint, engine, str(text.path), text.num_samples, text.sample_len)
        return Measured(lost, str(text.path), engine.info())
    if manifest.task in PAIRS:
        sources, source = _sources(checkpoint, manifest, text, shown)
        length = min(text.sample_len, manifest.max_context)
        return Measured(measure_pair(checkpoint, engine, sources, length, shown), source, engine.info())
    texts, source = heldout_texts(text.path, text.num_samples)
    if manifest.task != "embed":
        with shown.stage(f"comparing logits of {len(texts)} texts"):
            return Measured(measure_head(checkpoint, engine, texts), source, engine.info())
    with shown.stage(f"comparing embeddings of {len(texts)} texts"):
        return Measured(measure_encoder(checkpoint, engine, texts), source, engine.info())


def _activations(folder: Path, ids: NDArray[np.int64], vocabulary: int, shown: Progress) -> ActivationCost:
    with shown.stage("measuring what activations in eight bits cost each product") as stage:
        return measure_activations(folder, ids, vocabulary, stage.at)


def _sources(
    checkpoint: Checkpoint, manifest: PackageManifest, text: Text, shown: Progress
) -> tuple[dict[str, Any], str]:
    """What the encoder is given, and what it is called."""
    with shown.stage("getting held-out sounds or text ready"):
        features = sounds(checkpoint, str(text.path), text.num_samples)
    if features is not None:
        return {"input_features": features}, str(text.path)
    length = min(text.sample_len, manifest.max_context)
    ids, called = heldout_ids(checkpoint, manifest, text.path, text.num_samples, length, shown)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}, called


def _source(
    against: str | Path, manifest: PackageManifest, folder: Path, shown: Progress, max_ram: float | None
) -> Checkpoint:
    """The float model, which must be the one the package was made from."""
    checkpoint = Checkpoint.open(against, progress=shown, part=part_of(manifest.task), max_ram=max_ram)
    if checkpoint.identify(shown) != manifest.source["digest"]:
        raise ArtifactError(
            f"{checkpoint.location} is not the model {folder} was made from: its weights hash to "
            f"{checkpoint.digest[:12]}, the package names {manifest.source['digest'][:12]}; pass the right --against"
        )
    return checkpoint


def _check_integers(folder: Path, manifest: PackageManifest, artifact_path: Path) -> int:
    from roundexport.formats.artifact import Artifact
    from roundexport.targets.interface import load_target

    artifact = Artifact.open(artifact_path)
    found = load_target(manifest.target).read_back(folder)
    wrong = [n for n in artifact.names() if n not in found or not found[n].equals(artifact.linear(n))]
    extra = sorted(set(found) - set(artifact.names()))
    if wrong or extra:
        raise ArtifactError(
            f"{folder}: integers differ from {artifact_path} in {len(wrong)} layers {wrong[:3]}, "
            f"and {len(extra)} layers are not in the artifact {extra[:3]}; export it again"
        )
    return len(found)
