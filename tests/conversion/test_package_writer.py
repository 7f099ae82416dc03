"""Text written by the 8-bit package: of the model's distribution, the same for a seed, and only where it pays."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import roundexport
from roundexport.calibration import self_generated
from roundexport.calibration.self_generated import beginnings
from roundexport.cli.app import main
from roundexport.conversion import convert, package_writer
from roundexport.conversion.package_writer import PackageWriter
from roundexport.errors import GateError, Interrupted, WontFitError
from roundexport.formats.artifact import Artifact
from roundexport.model.checkpoint import Checkpoint
from roundexport.targets import export as targets_export


def test_a_package_writes_what_the_model_would(models: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(models("llama, one block"))
    writer, places = PackageWriter("onnx"), list[str]()
    ids = writer(checkpoint, beginnings(checkpoint, 2000, 3), 3, 1, lambda _, place: places.append(place))
    assert ids.shape == (2000, 3) and (ids[:, 0] == 0).all() and places[0] == "rounding to 8 bits"
    with torch.no_grad():
        logits = checkpoint.load_model()(input_ids=torch.zeros(1, 1, dtype=torch.long)).logits[0, -1]
    likely = torch.softmax(logits, -1).numpy()
    counts = np.bincount(ids[:, 1], minlength=len(likely)) / len(ids)
    top = likely.argsort()[-20:]
    # Binomial: five standard deviations, and what eight bits change.
    assert (np.abs(counts - likely)[top] <= 5 * np.sqrt(likely[top] / len(ids)) + 0.05 * likely[top]).all()


def test_little_text_of_a_small_model_is_not_worth_a_package(models: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    assert not PackageWriter("onnx").worth_it(checkpoint, 128, 512)
    assert PackageWriter("onnx").worth_it(checkpoint, 10**6, 10**4)


def _calibration(artifact: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))["calibration"]
    return found


@pytest.mark.parametrize("installed", [True, False])
def test_python_and_the_command_line_write_the_same_text(
    installed: bool, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(package_writer, "_WORTH", 1.0)
    monkeypatch.setattr("roundexport.targets.export.export", _once(tmp_path / "exported"))
    if not installed:
        monkeypatch.setattr(package_writer, "_installed", lambda _: False)
    model, asked = (
        models("llama, one block"),
        {"calibration": "self", "num_samples": 4, "sample_len": 16, "group_size": 32},
    )
    ways = ("tune", "convert")
    for way, run in zip(ways, (roundexport.tune, roundexport.convert), strict=True):
        monkeypatch.setenv("ROUNDEXPORT_CACHE", str(tmp_path / f"cache of {way}"))
        monkeypatch.setattr(convert, "export", _stop)
        with suppress(GateError):
            run(model, tmp_path / way, roundexport.TuneSettings(**asked))
    monkeypatch.setenv("ROUNDEXPORT_CACHE", str(tmp_path / "cache of the command line"))
    flags = [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", ["roundexport", "tune", str(model), str(tmp_path / "cli"), *flags])
    with pytest.raises(SystemExit, match="0"):
        main()
    first, *others = (_calibration(tmp_path / name) for name in ("tune", "convert/artifact", "cli"))
    assert others == [first, first]
    assert ("8-bit package for openvino" in first["source"]) == installed
    assert first.get("instead_of") == (None if installed else "8-bit package")
    said = capsys.readouterr().err.count("its 8-bit package cannot: no target's exporter is installed")
    assert said == (0 if installed else 3)


def _once(kept: Path) -> Callable[..., None]:
    """The export, which copies what it made of the very same artifact before: three ways write with one package."""
    right = targets_export.export

    def export(artifact: Path, out: Path, *, to: str, **rest: Any) -> None:
        made = kept / to / Artifact.open(artifact).digest
        if not made.exists():
            right(artifact, made, to=to, **rest)
        shutil.copytree(made, out)

    return export


def _stop(*_: object, **__: object) -> None:
    raise GateError("far enough")


@pytest.mark.parametrize("raised", [RuntimeError("out of memory"), KeyError("no lib"), MemoryError()])
def test_a_runtime_that_fails_while_it_writes_leaves_the_writing_to_torch(
    raised: Exception, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine:
        def start(self, **_: object) -> Any:
            raise raised

    class Writer(PackageWriter):
        def worth_it(self, *_: object) -> bool:
            return True

        def __call__(self, checkpoint: Checkpoint, begun: Any, length: int, seed: int, report: Any) -> Any:
            return package_writer._sample(Engine(), begun, length, 2, seed, report)

    monkeypatch.setenv("ROUNDEXPORT_CACHE", str(tmp_path))
    told = list[str]()
    found = self_generated.written_samples(
        Checkpoint.open(models("llama, one block")), 2, 8, 1, writer=Writer("onnx"), say=told.append
    )
    assert found.ids.shape == (2, 8) and found.identity["instead_of"] == "8-bit package for onnx"
    assert f"its runtime failed while it wrote ({type(raised).__name__}: " in told[0]


def test_what_is_refused_or_stopped_while_it_writes_stays_what_it_is() -> None:
    for raised in (Interrupted("stopped"), KeyboardInterrupt()):
        engine = SimpleNamespace(start=Mock(side_effect=raised))
        with pytest.raises(type(raised)):
            package_writer._sample(engine, np.zeros((2, 1), np.int64), 8, 2, 1, lambda *_: None)


@pytest.mark.parametrize(("gib", "bits"), [(None, 8), (8.0, 8), (4.9, 8), (4.3, 4), (3.0, 4)])
def test_the_package_has_the_most_bits_that_fit(
    gib: float | None, bits: int, models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package_writer, "package_bytes", lambda _, settings: settings.bits << 28)  # 2 GiB, or 1
    monkeypatch.setattr("roundexport.environment.memory.memory_limit", lambda: None)
    monkeypatch.setattr("roundexport.environment.memory._held", lambda: 3 << 28)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=8 << 30))
    checkpoint = Checkpoint.open(models("llama, one block"))
    assert PackageWriter("onnx", gib).called(checkpoint) == f"{bits}-bit package for onnx"


def test_a_package_that_does_not_fit_is_refused_before_it_is_made(models: Callable[[str], Path]) -> None:
    checkpoint, said = Checkpoint.open(models("llama, one block")), list[str]()
    with pytest.raises(WontFitError, match=r"a 4-bit package of the model writes, takes .*--calibration FILE"):
        PackageWriter("onnx", 0.001)(
            checkpoint, beginnings(checkpoint, 4, 16), 16, 1, lambda _, place: said.append(place)
        )
    assert not said


def test_a_folder_for_temporary_files_that_is_too_small_is_told(
    models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(models("llama, one block"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(WontFitError, match=r"writing calibration text takes .* of disk .*its package.* as TMPDIR"):
        PackageWriter("onnx")(checkpoint, beginnings(checkpoint, 4, 16), 16, 1, lambda *_: None)
