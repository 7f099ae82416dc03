"""A vision-language model in, packages out that read pictures: each part converted by itself, then put together.

    OUT/vision   a conversion of the image side        OUT/text   one of the language model, whose graphs read vectors
    OUT/onnx, OUT/openvino                             both in one folder, shown a picture as a check

Each part is tuned on its own samples (pictures, text), proven and verified as it is alone; nothing in either is changed
when they are joined.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from roundexport.calibration.images import dead_leaves
from roundexport.calibration.mixture import AUTO, SELF
from roundexport.errors import UnsupportedError, UsageError, WrongOutputsError
from roundexport.formats.joined_package import join_packages
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.parts import PARTS
from roundexport.progress import Progress
from roundexport.targets.interface import load_target
from roundexport.tuning.settings import TuneSettings
from roundexport.verification.sight import Sight, compare_sight

from .asked_targets import Asked, refusals, settle
from .claimed_folder import claimed, resumable, write_result
from .convert import Conversion, convert_as
from .settings import ConvertSettings

_SIDE = 96  # pixels of the picture that a finished package is shown


@dataclass(frozen=True)
class WholeConversion:
    """What `convert_whole` made.

    Args:
        packages: target -> package folder that reads pictures.
        parts: part -> its conversion.
        left_out: target -> why it cannot take the model, of those that were asked for by default.
        sights: target -> how far its answer about a picture is from the whole model's, of those that this call joined.
    """

    packages: dict[str, Path]
    parts: dict[str, Conversion]
    left_out: dict[str, str] = field(default_factory=dict)
    sights: dict[str, Sight] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The conversion as a JSON object."""
        return {
            "packages": {name: str(path) for name, path in self.packages.items()},
            "parts": {name: part.to_json() for name, part in self.parts.items()},
            "left_out": self.left_out,
            "sights": {name: asdict(sight) for name, sight in self.sights.items()},
        }


def convert_whole(
    model: str | Path, out: str | Path, settings: TuneSettings, wanted: ConvertSettings, shown: Progress
) -> WholeConversion:
    """Convert both parts of a vision-language model and join them, for each target.

    Args:
        model: Hugging Face model folder or hub id.
        out: folder to make; an interrupted run of the same request goes on, and further targets can be added.  What is
            finished in it is verified again where something is left to do.
        settings: how to tune; a folder as calibration is pictures, for the image side, anything else the language
            model's.
        wanted: all else that is asked for; gates of cosine are the image side's, the others the language model's.
        shown: where progress is shown.

    Raises:
        UsageError: something is asked for that goes with one part alone.
        UnsupportedError: pictures of such a model are not read.
        RoundexportError: as of `convert`.
    """
    if wanted.kernels or wanted.cluster is not None:
        named = "--kernels" if wanted.kernels else "--cluster"
        raise UsageError(f"{named} goes with one part of a model, not with --part all")
    folder, asked = Path(out), wanted.asked
    own = {part: _of_part(settings, part) for part in PARTS}
    found = {part: Checkpoint.open(model, progress=shown, part=part, max_ram=settings.max_ram) for part in PARTS}
    _check_pictures(found["vision"])
    request = {"model": found["text"].identify(shown), **settings.by_content()}
    judges = wanted.judges(shown)
    with claimed(folder, request, asked, judges), resumable(folder), shown:
        left_out: dict[str, str] = {}
        with shown.stage("checking that every target takes both parts"):
            for part in PARTS:
                left_out |= refusals(found[part], own[part], asked.names, inputs_embeds=part == "text")
        for sentence in settle(asked, left_out, model, out):
            shown.say(sentence)
        targets = [name for name in asked.names if name not in left_out]
        made, gates = Asked(tuple(targets), by_name=True), wanted.gates
        of_part = {
            "vision": ConvertSettings(made, gates=replace(gates, max_kl=None, min_top1=None)),
            "text": ConvertSettings(made, wanted.text, replace(gates, min_cosine=None), inputs_embeds=True),
        }
        parts = {
            part: convert_as(model, folder / part, own[part], of_part[part], shown, again=True)
            for part in ("vision", "text")
        }
        packages = {name: folder / name for name in targets}
        sights: dict[str, Sight] = {}
        for name, package in packages.items():
            if not package.exists():
                sights[name] = _join(folder, name, found["text"].folder, settings.max_ram, shown)
                shown.say(f"{name}: {sights[name]}")
    done = WholeConversion(packages, parts, left_out, sights)
    write_result(folder, done.to_json(), judges)
    return done


def _join(folder: Path, name: str, model: Path, max_ram: float | None, shown: Progress) -> Sight:
    """Put both packages of a target together; returns how far the answer about a picture is from the whole model's."""
    sights: list[Sight] = []

    def check(joined: Path) -> dict[str, Any]:
        check_sight(joined)
        artifacts = [folder / part / "artifact" for part in PARTS]
        sights.append(compare_sight(joined, model, artifacts, max_ram))
        return asdict(sights[0])

    with shown.stage(f"joining both parts for {name}, and showing it a picture"):
        join_packages(folder / "text" / name, folder / "vision" / name, folder / name, check, load_target(name).joined)
    return sights[0]


def check_sight(package: Path) -> None:
    """Show a package a picture.

    Raises:
        WrongOutputsError: its answer is not a number, or the same as without it.
        RoundexportError: it cannot be opened.
    """
    from roundexport.runtime.loading import load
    from roundexport.runtime.seeing import SeeingDecoder

    opened = load(package)
    if not isinstance(opened, SeeingDecoder):
        raise WrongOutputsError(f"{package} opens as {type(opened).__name__}, which reads no pictures")
    pictures = [dead_leaves(_SIDE, _SIDE, np.random.default_rng(seed)) for seed in range(2)]
    with opened.start(rows=2) as session:
        rows = session.add(2)
        prompts = [opened.encode("", pictures=[picture]) for picture in pictures]
        logits = session.extend(dict(zip(rows, prompts, strict=True))).copy()
    if not np.isfinite(logits).all() or np.array_equal(*logits):
        raise WrongOutputsError(f"{package}: two pictures bring the same answer, or one that is not a number")


def _of_part(settings: TuneSettings, part: str) -> TuneSettings:
    """The settings of one part: each has the calibration that is of its kind."""
    pictures = settings.calibration not in (AUTO, SELF) and Path(settings.calibration).is_dir()
    instead = SELF if part == "vision" else AUTO
    return replace(settings, part=part, calibration=settings.calibration if pictures == (part == "vision") else instead)


def _check_pictures(checkpoint: Checkpoint) -> None:
    """Refuse, before any work, a model whose pictures the runtime does not read."""
    from roundexport.runtime.images import FILE
    from roundexport.runtime.picture_words import words_of
    from roundexport.runtime.tiles import read_tiling
    from roundexport.runtime.tokenizer import read_json

    words_of(str(read_json(checkpoint.folder / "config.json").get("model_type")))
    path = checkpoint.folder / FILE
    if not path.is_file():
        raise UnsupportedError(f"{checkpoint.location} has no {FILE}, which says how pictures are prepared for it")
    read_tiling(read_json(path), str(path))
