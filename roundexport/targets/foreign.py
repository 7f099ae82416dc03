"""An artifact in a format of others (exporters/): `export` where nothing is captured and no runtime compares.

The proof is the reading back: integers, scales and zero points by this project's importer, or by the format's own
package, equal to the artifact's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from roundexport import plugins
from roundexport.errors import UsageError
from roundexport.exporters._outgoing import Outgoing
from roundexport.exporters.interface import Exporter
from roundexport.formats.artifact import Artifact
from roundexport.model.checkpoint import Checkpoint
from roundexport.progress import Progress
from roundexport.storage.atomic import write_folder

from .interface import ExportReport

_USUAL = {"device": "cpu"}


def foreign_name(to: str) -> str | None:
    """The exporter that a user means, as in ``compressed-tensors``; None of a runtime's target.

    Raises:
        UsageError: neither a target nor an exporter has this name.
    """
    name, formats = to.replace("-", "_"), plugins.names("exporters")
    if name in formats:
        return name
    targets = plugins.names("targets")
    if to not in targets:
        raise UsageError(
            f"unknown target {to!r}; known: {', '.join(targets)}, and as formats of others {', '.join(formats)}"
        )
    return None


def export_foreign(
    name: str, artifact: Artifact, checkpoint: Checkpoint, out: Path, settings: Mapping[str, object], shown: Progress
) -> ExportReport:
    """Write an artifact in a format of others.

    Args:
        name: of the exporter.
        artifact: the integers.
        checkpoint: the float model that they came from.
        out: folder to make; must not exist.
        settings: those of `export`, of which none may be given.
        shown: where to report.

    Raises:
        UsageError: ``out`` exists, or a setting is given.
        UnsupportedError: a layer that the format cannot hold exactly, or an artifact without integers.
    """
    given = sorted(key for key, value in settings.items() if value is not None and value != _USUAL.get(key))
    if given:
        raise UsageError(f"the format {name} has no setting {', '.join(given)}; they are for packages of a runtime")
    exporter: Exporter = plugins.load_value("exporters", name, "EXPORTER", Exporter)
    checkpoint.check_side_files()
    plan = exporter.plan(Outgoing(artifact, checkpoint))
    with write_folder(out) as folder, shown.stage(f"writing {exporter.title} and reading it back"):
        written = plan.write(folder)
        files = {
            str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
        }
    return ExportReport(
        name, written.exported, kept_float=written.kept_float, files=files,
        notes=(*checkpoint.notes, *written.notes),
    )  # fmt: skip
