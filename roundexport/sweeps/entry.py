"""`sweep`: conversions of models by every recipe, bit width and group size, and the frontier of what came out.

    OUT/runs/<name>/           one conversion each (grid.py); what is finished is kept, what was interrupted goes on
    OUT/samples/               calibration samples, drawn once for all runs that ask for the same
    OUT/<model>.bench.json     times of a model's packages, measured in turn after the last run
    OUT/frontier.json          a row per package
    OUT/<model>.html           the report of a model's packages, with the plots of size, speed and loss

With workers, each does whole runs, which is less to wait for than shared blocks; times are taken by this process alone,
when all of them are done.  What the float model says of the held-out text is remembered by verification
(float_model.py): one run computes it, the others of the same cache wait for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roundexport.cluster.address import Address
from roundexport.cluster.opening import open_cluster
from roundexport.environment.disk import bytes_in, check_disk
from roundexport.errors import Interrupted, RoundexportError, UsageError
from roundexport.progress import Progress
from roundexport.reports.writing import write_report
from roundexport.storage.atomic import replace_file
from roundexport.storage.disk_errors import explained
from roundexport.storage.locks import writing
from roundexport.tuning.settings import TuneSettings

from .frontier import frontiers
from .grid import Axes, SweepRun, runs_of
from .running import attempt, do, finished, rows_of

MARK, FRONTIER = "sweep.json", "frontier.json"
_PROMPT, _OUTPUT, _ROUNDS = 128, 32, 3


@dataclass(frozen=True)
class Sweep:
    """What a sweep made.

    Args:
        rows: a row per package, and per run that failed.
        reports: an HTML file per model.
        failed: name of a run -> why it failed.
    """

    rows: list[dict[str, Any]]
    reports: list[Path]
    failed: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"rows": self.rows, "reports": [str(path) for path in self.reports], "failed": self.failed}


def sweep(  # noqa: PLR0913  (the parameters are the verb's flags)
    models: str | Path | Sequence[str | Path],
    out: str | Path,
    settings: TuneSettings | None = None,
    *,
    axes: Axes | None = None,
    to: Sequence[str] = ("onnx",),
    text: str | Path | None = None,
    speed: bool = True,
    cluster: str | None = None,
    progress: bool | Progress = True,
) -> Sweep:
    """Convert models in many ways and say which packages no other beats.

    Args:
        models: Hugging Face folders, GGUF files or hub ids.
        out: folder to make; the same call goes on where an earlier one ended, and more runs can be added.
        settings: what all runs have in common.
        axes: what is varied: recipes, bits, group sizes.
        to: targets.
        text: held-out text file for verification; None: the one that comes with this package.
        speed: also time the packages.
        cluster: workers that do whole runs, as ``local:2``, ``auto`` or ``ray://HOST``; None: one run after the other.
        progress: report on stderr, or where to report.

    Returns:
        The frontier, also written to ``out``.

    Raises:
        UsageError: ``out`` is something else, an axis or a model makes no sense, or the workers share by a store.
        Interrupted: on Ctrl-C; the same call goes on.
        RoundexportError: no run came to its end.
    """
    if cluster is not None and Address.parse(cluster).store is not None:
        raise UsageError(
            f"--cluster {cluster}: a sweep's workers do whole runs, and all of them must see the runs' folders; leave "
            "out what follows @"
        )
    folder, shown = Path(out).absolute(), Progress.of(progress)
    given = [models] if isinstance(models, str | Path) else list(models)
    runs = runs_of(given, axes or Axes(), settings or TuneSettings(), tuple(to), folder, text, shown)
    _claim(folder)
    with writing(folder), shown:
        failed = _all(runs, cluster, shown)
        rows = [row for run in runs for row in rows_of(run, failed.get(run.name, ""))]
        packages: dict[str, list[Path]] = {}
        for row in rows:
            if row.package is not None:
                packages.setdefault(row.about["model"], []).append(row.package)
        if not packages:
            raise RoundexportError(f"no run came to its end; the first failed: {next(iter(failed.values()), '')}")
        records, speeds = {model: folder / f"{model}.bench.json" for model in packages}, dict[str, float]()
        made = _kept(frontiers(rows, {}), folder)  # whatever becomes of the times
        for model, own in packages.items() if speed else ():
            speeds |= _timed(own, records[model], shown)
            made = _kept(frontiers(rows, speeds), folder)
        reports = [folder / f"{model}.html" for model in packages]
        for path, (model, own) in zip(reports, packages.items(), strict=True):
            write_report(own, path, bench=[records[model]] if records[model].is_file() else [])
    return Sweep(made, reports, failed)


def _claim(folder: Path) -> None:
    """Make the folder, or make sure that it is a sweep's."""
    if folder.exists() and not (folder / MARK).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists already and is not a sweep's; remove it or name another folder")
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / MARK, b'{"format": "roundexport-sweep/1"}\n')


def _all(runs: Sequence[SweepRun], cluster: str | None, shown: Progress) -> dict[str, str]:
    """Do what is left; returns the reasons of the runs that failed, by name."""
    left = [run for run in runs if not finished(run)]
    parts = {f"{len(left)} artifacts with their packages": sum(run.disk for run in left)}
    advice = "free some, or ask for fewer models, recipes, bits or targets"
    disk = check_disk(runs[0].folder, "the sweep", parts, advice, there=sum(bytes_in(run.folder) for run in left))
    shown.say(f"{len(runs)} runs, {len(runs) - len(left)} of them done before; {disk}")
    errors: dict[str, str] = {}
    try:
        with (
            shown.stage("runs") as stage,
            open_cluster(cluster if left else None, say=shown.say, max_ram=runs[0].settings.max_ram) as workers,
        ):
            results = (
                (attempt(run, shown) for run in left)
                if workers is None
                else workers.workers.map(do, left, given_up=str)
            )
            for number, (run, error) in enumerate(zip(left, results, strict=True), 1):
                stage.at(number / len(left), run.name)
                shown.say(f"{run.name}: {error or 'done'}")
                errors |= {run.name: error} if error else {}
    except KeyboardInterrupt as error:
        done = sum(map(finished, runs))
        raise Interrupted(f"stopped after {done} of {len(runs)} runs; run the same command again to go on") from error
    return errors


def _kept(made: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    replace_file(folder / FRONTIER, (json.dumps(made, indent=1) + "\n").encode())
    return made


def _timed(packages: Sequence[Path], path: Path, shown: Progress) -> dict[str, float]:
    """Tokens (or texts) per second of packages, measured in turn; taken from an earlier call where that timed all.

    A package that its runtime does not open is told and left out; so are all where their timing fails.  What opens is
    found out in a process of its own: nothing of a package stays in this one, and a library that dies takes none along.
    """
    from roundexport.runtime import bench, package_contestant
    from roundexport.runtime.benchmarking.process import ContestantProcess

    names = [str(package) for package in packages]
    if path.is_file():
        known = _speeds(json.loads(path.read_text(encoding="utf-8")), names)
        if len(known) == len(names):
            return known
    for package in packages:
        try:
            ContestantProcess(package_contestant(package, check_hashes=False), threads=1).close()
        except Exception as error:
            shown.say(f"note: {package} is not timed: {_reason(error)}")
            names.remove(str(package))
    if not names:
        return {}
    try:
        with shown.stage(f"timing {len(names)} packages in turn"):
            report = bench(
                names, prompt_lens=[_PROMPT], output_len=_OUTPUT, rounds=_ROUNDS, batch_sizes=[1], cold=False,
                on_progress=shown.say,
            ).to_json()  # fmt: skip
    except Exception as error:  # hours of conversions are not lost to it
        shown.say(f"note: nothing of {len(names)} is timed: {_reason(error)}; run the same command again to time them")
        return {}
    replace_file(path, (json.dumps(report, indent=1, default=str) + "\n").encode())
    return _speeds(json.loads(path.read_text(encoding="utf-8")), names)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, RoundexportError) else f"{type(error).__name__}: {error}"


def _speeds(report: dict[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Speed by package, of those that a record has."""
    found: dict[str, float] = {}
    for row in report.get("rows", []):
        speed = row.get("decode_tps", row.get("texts_per_s"))
        name = str(row.get("contestant", "")).split(" · ")[0]
        own = [full for full in names if full == name or full.endswith(f"/{name}")]
        if speed is not None and len(own) == 1:
            found[own[0]] = max(float(speed), found.get(own[0], 0.0))
    return found
