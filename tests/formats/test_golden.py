"""An artifact and a package of each target that an earlier version wrote: they load, answer as they did, and export.

`tests/golden/` holds a float Llama of two layers and 384 tokens (`model`), its 4-bit artifact and both packages, as
written by roundexport 0.1.0 with torch 2.13, onnxruntime 1.31 and OpenVINO 2026.4.  The numbers below were read from
those packages on the day they were made.  A change that breaks one of these tests breaks folders that users have.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import roundexport
from conftest import ROOT
from roundexport import plugins
from roundexport.cli.app import app
from roundexport.formats.artifact import Artifact
from roundexport.formats.package import read_package
from roundexport.runtime import Decoder, load

GOLDEN = ROOT / "tests" / "golden"
TARGETS = ("onnx", "openvino")
PROMPT = [5, 9, 200, 33, 17, 4, 350, 8]
GREEDY = [86, 192, 192, 192, 192, 192, 192, 192]
BEST = {76, 350, 134, 355, 86}  # the five largest logits behind the prompt, and below the first six of them
LOGITS = (-0.0434626, -0.1732041, 0.0974033, 0.3766809, 0.0954605, 0.0382184)


@pytest.fixture(scope="module", params=TARGETS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    opened = load(GOLDEN / str(request.param), threads=1, precise=True)
    assert isinstance(opened, Decoder)
    return opened


def test_an_old_package_gives_its_recorded_tokens(decoder: Decoder) -> None:
    assert decoder.greedy([PROMPT], 8)[0].tolist() == GREEDY


def test_an_old_package_gives_its_recorded_logits(decoder: Decoder) -> None:
    last = decoder.logits(np.array([PROMPT]))[0, -1]
    assert set(last.argsort()[-5:].tolist()) == BEST
    np.testing.assert_allclose(last[:6], LOGITS, rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_an_old_package_holds_the_old_artifacts_integers(target: str) -> None:
    _same_integers(target, GOLDEN / target)


@pytest.mark.parametrize("target", TARGETS)
def test_an_old_artifact_still_exports_with_its_integers(target: str, tmp_path: Path) -> None:
    roundexport.export(GOLDEN / "artifact", tmp_path / "out", to=target, model=GOLDEN / "model")
    _same_integers(target, tmp_path / "out")
    old, new = read_package(GOLDEN / target), read_package(tmp_path / "out")
    assert (new.layers, new.tokens, new.kv, new.max_context) == (old.layers, old.tokens, old.kv, old.max_context)


@pytest.mark.parametrize("target", TARGETS)
def test_verify_finds_every_file_of_an_old_package_as_written(target: str) -> None:
    folder = GOLDEN / target
    result = CliRunner().invoke(app, ["verify", str(folder), "--files"])
    assert result.exit_code == 0, result.output
    assert f"{len(read_package(folder).files)} files have the sizes" in result.output


def _same_integers(target: str, package: Path) -> None:
    artifact, found = Artifact.open(GOLDEN / "artifact"), plugins.load("targets", target).read_back(package)
    assert sorted(found) == sorted(artifact.names())
    assert all(found[name].equals(artifact.linear(name)) for name in artifact.names())
