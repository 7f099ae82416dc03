"""From package folders to records: the package's manifest, its artifact's, what verify found, what bench timed.

    roundexport.json     in the package
    verification.json    in the package, or quality.json beside it, where `convert` keeps what it found
    manifest.json        of the artifact that the package names by hash: ``--artifact``, or a folder beside the package
    bench.json           ``--bench``

Only the first must be there.  What is not is named, with the command that makes it.  Files are not hashed: a report
tells what was recorded, and `verify` is what holds bytes against their hashes.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from roundexport.errors import ArtifactError, UsageError
from roundexport.formats.artifact_manifest import MANIFEST, Manifest
from roundexport.formats.package import PackageManifest, read_package
from roundexport.formats.verification_record import read_record

from .numbers import at
from .provenance import provenance
from .records import Missing, PackageRecord, Timing
from .timing import read_timings

_QUALITY = "quality.json"
_LONGEST = 64 << 20


def gather(
    packages: Sequence[str | Path], bench: Sequence[str | Path] = (), artifacts: Sequence[str | Path] = ()
) -> tuple[tuple[PackageRecord, ...], tuple[Timing, ...]]:
    """Everything recorded about some packages.

    Args:
        packages: their folders.
        bench: benchmark records.
        artifacts: folders of artifacts, where they are not beside the packages.

    Returns:
        A record per package, in the order given, and all timings of the benchmarks.

    Raises:
        UsageError: no package, one twice, a benchmark that cannot be read, or an artifact that none was made from.
        ArtifactError: a folder is no package, or its files do not have their sizes.
    """
    folders = [Path(package) for package in packages]
    if not folders:
        raise UsageError("nothing to report: give at least one package folder")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError(f"a package is given twice: {', '.join(map(str, folders))}")
    timings = read_timings([Path(path) for path in bench])
    given = {folder: _manifest_bytes(Path(folder), must=True) for folder in artifacts}
    labels = _labels(folders)
    records = tuple(_record(folder, label, timings, given) for folder, label in zip(folders, labels, strict=True))
    named = {str(record.manifest.source["artifact"]) for record in records}
    for folder, data in given.items():
        if data is not None and hashlib.sha256(data).hexdigest() not in named:
            raise UsageError(f"--artifact {folder}: none of the packages was made from it")
    return records, timings


def _labels(folders: Sequence[Path]) -> list[str]:
    """A folder's name, with as much of its path as it takes to tell it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(folder) for folder in folders]


def _record(folder: Path, label: str, timings: Sequence[Timing], given: Mapping[Any, bytes | None]) -> PackageRecord:
    manifest = read_package(folder, check_hashes=False)
    artifact = _artifact(folder, str(manifest.source["artifact"]), given)
    verification = read_record(folder) or _beside(folder, manifest)
    own = tuple(timing for timing in timings if _is_about(timing, folder, label))
    missing = tuple(_missing(folder, manifest, artifact, verification, bool(own)))
    return PackageRecord(label, folder, manifest, artifact, verification, provenance(folder, manifest), own, missing)


def _is_about(timing: Timing, folder: Path, label: str) -> bool:
    """Whether a timing is of this package: the folder's name, and more of the path where bench gave more."""
    if timing.package != folder.resolve().name:
        return False
    named = timing.contestant.split(" · ")[0].rstrip("/")
    same = "/".join(Path(named).parts[-len(Path(label).parts) :])
    return "/" not in named or "/" not in label or same == label


def _artifact(folder: Path, digest: str, given: Mapping[Any, bytes | None]) -> Manifest | None:
    """The manifest with this hash, of the artifacts given and those beside the package."""
    for data in [*given.values(), *_nearby(folder)]:
        if data is not None and hashlib.sha256(data).hexdigest() == digest:
            try:
                return Manifest.from_json(data)
            except ArtifactError:
                return None
    return None


def _nearby(folder: Path) -> Iterator[bytes | None]:
    beside = folder.resolve().parent
    try:
        found = sorted(path.parent for path in beside.glob(f"*/{MANIFEST}"))
    except OSError:
        return
    yield from (_manifest_bytes(path) for path in sorted(found, key=lambda path: path.name != "artifact"))


def _manifest_bytes(folder: Path, must: bool = False) -> bytes | None:
    path = folder / MANIFEST
    try:
        return path.read_bytes() if path.stat().st_size <= _LONGEST else None
    except OSError as error:
        if must:
            raise UsageError(f"--artifact {folder} has no {MANIFEST} that can be read: {error.strerror}") from error
        return None


def _beside(folder: Path, manifest: PackageManifest) -> Mapping[str, Any] | None:
    """The package's entry in the quality.json that `convert` left beside it."""
    path = folder.resolve().parent / _QUALITY
    try:
        if path.stat().st_size > _LONGEST:
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    made, record = at(found, "packages", manifest.target), at(found, "quality", manifest.target)
    if not isinstance(made, str) or Path(made).name != folder.resolve().name or not isinstance(record, Mapping):
        return None
    return record


def _missing(
    folder: Path, manifest: PackageManifest, artifact: Manifest | None, verification: Any, timed: bool
) -> Iterator[Missing]:
    where, model = shlex.quote(folder.name), shlex.quote(_name_of(manifest))
    verify = f"roundexport verify {where} --against {model}"
    if verification is None:
        yield Missing("what the package lost", verify)
    elif manifest.task == "generate" and at(verification, "quality", "kl_histogram") is None:
        yield Missing("how KL is distributed over tokens", verify)
    if manifest.layers and artifact is None:
        yield Missing("bits per weight and errors per layer", f"roundexport report {where} --artifact ARTIFACT …")
    elif artifact is not None and artifact.layers and not any(_has_losses(layer) for layer in artifact.layers):
        method = artifact.algorithm["name"]
        again = f"roundexport convert {model} OUT"
        if method == "gram":
            yield Missing("errors per layer (tuned before they were recorded)", again)
        else:
            yield Missing(f"errors per layer ({method} does not measure them)", again)
    if not timed:
        yield Missing(
            "speed", f"roundexport bench {where} --json > bench.json; roundexport report {where} --bench bench.json …"
        )


def _has_losses(layer: Any) -> bool:
    return layer.loss_before is not None and layer.loss_after is not None


def _name_of(manifest: PackageManifest) -> str:
    """The model as a command can name it, without folders of the machine that made the package."""
    location = str(manifest.source["location"])
    return Path(location).name if Path(location).is_absolute() else location
