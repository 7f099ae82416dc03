"""Model in, verified packages out: tune, export to every target asked for, verify each, in one call.

A checkpoint that others have quantized is imported instead of tuned (importing.py).

OUT/artifact   the tuned integers          OUT/onnx, OUT/openvino   packages, each with its model card, README.md
OUT/quality.json   what was lost                  OUT/rounds     while a target KL is searched for (kl_search.py)
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from roundexport.errors import Interrupted, RoundexportError, together
from roundexport.formats.artifact import Artifact
from roundexport.graph.kept_captures import captures_kept
from roundexport.model.checkpoint import Checkpoint
from roundexport.progress import Progress
from roundexport.reports.writing import card_after_conversion
from roundexport.targets.export import export
from roundexport.targets.interface import ExportReport, load_target
from roundexport.targets.w8a8 import export_w8a8
from roundexport.targets.w8a8_control import USUAL, Allowance
from roundexport.tuning.chosen_methods import with_samples
from roundexport.tuning.settings import TuneSettings
from roundexport.verification.gates import Gates
from roundexport.verification.heldout import check_heldout
from roundexport.verification.report import QualityReport
from roundexport.verification.verify import verify

from .asked_targets import Asked, graph_settings, refusals, settle
from .claimed_folder import claimed, resumable, write_result
from .encoder_recipes import check as check_encoder
from .encoder_recipes import is_encoder_recipe, token_ids
from .encoder_recipes import make_artifact as make_encoder
from .encoder_recipes import samples as calibration_samples
from .importing import import_checkpoint, refuse_settings
from .kl_search import KlSearch, may_change, rounds_of, searches
from .outlook import check_room, outlook
from .settings import ConvertSettings
from .tune import tune


@dataclass(frozen=True)
class Conversion:
    """What `convert` made.

    Args:
        artifact: the artifact folder.
        packages: target -> package folder.
        exports: target -> export report, of the packages that this call made.
        quality: target -> figures against the float model.
        bits_per_weight: all artifact bits over quantized weights.
        left_out: target -> why it cannot take the model, of those that were asked for by default.
    """

    artifact: Path
    packages: dict[str, Path]
    exports: dict[str, ExportReport]
    quality: dict[str, QualityReport]
    bits_per_weight: float
    left_out: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The conversion as a JSON object."""
        return {
            "artifact": str(self.artifact),
            "bits_per_weight": self.bits_per_weight,
            "packages": {name: str(path) for name, path in self.packages.items()},
            "exports": {name: report.to_json() for name, report in self.exports.items()},
            "quality": {name: report.to_json() for name, report in self.quality.items()},
            "left_out": self.left_out,
        }


def convert(  # noqa: PLR0913  (the parameters are the verb's flags)
    model: str | Path,
    out: str | Path,
    settings: TuneSettings | None = None,
    *,
    to: str | Sequence[str] | None = None,
    text: str | Path | None = None,
    max_kl: float | None = None,
    min_top1: float | None = None,
    min_cosine: float | None = None,
    inputs_embeds: bool = False,
    kernels: bool = False,
    cluster: str | None = None,
    progress: bool | Progress = True,
) -> Conversion:
    """Tune a model, export it to each target and verify each package against the float model.

    Args:
        model: Hugging Face model folder or hub id, GGUF file, or a checkpoint that others have quantized, whose
            integers are then taken as they are.
        out: folder to make; an interrupted run of the same request in it is resumed, finished parts are kept, and
            further targets can be added.
        settings: how to tune; None: the defaults of :class:`TuneSettings`.  Of a quantized one only ``part``.
        to: targets, as a list or comma-separated: ``onnx``, ``openvino``.  None: both; one that cannot take the model
            is then left out, which is said before tuning.
        text: held-out text file for verification; None: the one that comes with this package.
        max_kl: gate on mean KL, nats per token (decoders).
        min_top1: gate on top-1 agreement, 0 to 1 (decoders).
        min_cosine: gate on mean cosine (encoders); of recipe w8a8 also what its accuracy control keeps, .99 by default.
        inputs_embeds: of a decoder, let its graphs read vectors, and its table of tokens be a graph of its own.
        kernels: let products run by roundexport's own operator, in packages of targets that know it (ONNX); it must
            have been built on this machine.
        cluster: workers that share the tuning, see :func:`roundexport.conversion.tune.tune`.
        progress: show progress on stderr, or where to show it.

    Returns:
        Where everything is and what it cost.

    Raises:
        UsageError: ``out`` is something else, was begun with other settings, or is finished; or a parameter makes no
            sense.
        UnsupportedError: a target that was named cannot take the model, or none can; nothing was tuned.
        WontFitError: the disk or the memory cannot hold what is asked for.
        RoundexportError: a target failed; the others were still made, and are kept.
        Interrupted: on Ctrl-C; the same call goes on.
    """
    wanted = ConvertSettings(
        Asked.of(to), text, Gates(max_kl, min_top1, min_cosine), inputs_embeds=inputs_embeds, kernels=kernels,
        cluster=cluster,
    )  # fmt: skip
    return convert_as(model, out, settings or TuneSettings(), wanted, Progress.of(progress))


def convert_as(
    model: str | Path,
    out: str | Path,
    settings: TuneSettings,
    wanted: ConvertSettings,
    shown: Progress,
    again: bool = False,
) -> Conversion:
    """What `convert` does, its parameters put together.

    Args:
        model: as there.
        out: as there.
        settings: how to tune.
        wanted: all else that is asked for.
        shown: where progress is shown.
        again: of a finished conversion verify the packages again, instead of refusing it.

    Returns:
        As there.

    Raises:
        RoundexportError: as there.
    """
    folder, asked = Path(out), wanted.asked
    checkpoint = Checkpoint.open(model, progress=shown, part=settings.part, max_ram=settings.max_ram)
    refuse_settings(settings, checkpoint)
    if is_encoder_recipe(settings):
        check_encoder(checkpoint, settings, wanted.cluster)
    settings = with_samples(settings)
    wanted.gates.check(checkpoint.task)
    check_heldout(checkpoint.task, wanted.text)
    judges = wanted.judges(shown)
    more = graph_settings(asked, settings, wanted.inputs_embeds, wanted.kernels)
    request = {"model": checkpoint.identify(shown), **settings.by_content(), **more}
    exports: dict[str, ExportReport] = {}
    quality: dict[str, QualityReport] = {}
    failed: list[RoundexportError] = []
    still = None if again else asked
    with claimed(folder, request, still, judges, may_change), resumable(folder), captures_kept(), shown:
        artifact, left_out = folder / "artifact", dict[str, str]()
        to_tune = not (artifact / "manifest.json").exists()
        if to_make := [name for name in asked.names if not (folder / name).exists()]:
            shown.say(check_room(checkpoint, settings, folder, to_make, wanted.inputs_embeds, tuned=not to_tune))
            with shown.stage("checking that every target takes the model"):  # an hour of tuning later is too late
                left_out = refusals(checkpoint, settings, to_make, wanted.inputs_embeds)
            for sentence in settle(asked, left_out, model, out):
                shown.say(sentence)
        targets = [name for name in asked.names if name not in left_out]
        if to_tune:
            _make_artifact(checkpoint, folder, settings, wanted, targets, more, shown)
        else:
            shutil.rmtree(rounds_of(folder), ignore_errors=True)  # which a search that was killed at its end leaves
        for name in targets:
            try:
                if not (folder / name).exists():
                    exports[name] = _package(checkpoint, folder, name, settings, more, wanted.gates.min_cosine, shown)
                quality[name] = verify(
                    folder / name, against=model, artifact=artifact, text=wanted.text, **asdict(wanted.gates),
                    max_ram=settings.max_ram, progress=shown,
                )  # fmt: skip
                if why := card_after_conversion(folder / name):
                    shown.say(f"note: {why}")
            except Interrupted:
                raise
            except RoundexportError as error:  # the other targets are still wanted
                failed.append(error)
    if failed:
        kept = ", ".join(["artifact", *quality])
        raise together(failed, f"kept in {folder}: {kept}") from failed[0]
    done = Conversion(
        artifact=artifact,
        packages={name: folder / name for name in targets},
        exports=exports,
        quality=quality,
        bits_per_weight=Artifact.open(artifact, check_hashes=False).bits_per_weight,
        left_out=left_out,
    )
    write_result(folder, done.to_json(), judges)
    return done


def _make_artifact(
    checkpoint: Checkpoint,
    folder: Path,
    settings: TuneSettings,
    wanted: ConvertSettings,
    targets: Sequence[str],
    more: dict[str, bool],
    shown: Progress,
) -> None:
    """Tune a float model; of a quantized one take the integers."""
    model, artifact = checkpoint.location, folder / "artifact"
    if checkpoint.imported is not None:
        import_checkpoint(model, artifact, part=settings.part, max_ram=settings.max_ram, progress=shown)
        return
    if is_encoder_recipe(settings):
        make_encoder(checkpoint, artifact, settings, shown)
        return
    shown.say(outlook(checkpoint, settings, targets))
    if searches(settings):
        KlSearch(checkpoint, folder, settings, targets[0], wanted.text, shown, more, wanted.cluster).run()
    else:
        tune(model, artifact, settings, cluster=wanted.cluster, progress=shown)


def _package(
    checkpoint: Checkpoint,
    folder: Path,
    name: str,
    settings: TuneSettings,
    more: dict[str, bool],
    min_cosine: float | None,
    shown: Progress,
) -> ExportReport:
    """Export the artifact to one target; what a recipe for encoders does to a package afterwards, too."""
    model, artifact = checkpoint.location, folder / "artifact"
    if settings.recipe == "w8a8":
        ids = token_ids(calibration_samples(checkpoint, settings, shown))
        allowance = Allowance(ids, USUAL if min_cosine is None else min_cosine)
        return export_w8a8(
            artifact, folder / name, allowance, to=name, model=model, max_ram=settings.max_ram, progress=shown
        )
    return export(
        artifact, folder / name, to=name, model=model, settings=load_target(name).known(more),
        max_ram=settings.max_ram, progress=shown,
    )  # fmt: skip
