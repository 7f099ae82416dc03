"""What 8-bit activations cost each product: measured on the runtime, named, told, refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import ROOT
from roundexport import verify
from roundexport.cli import printing
from roundexport.errors import UnsupportedError, UsageError
from roundexport.formats.package import read_package
from roundexport.formats.verification_record import joined, read_record
from roundexport.reports import accuracy
from roundexport.runtime.engines._ort_levels import with_int8_activations
from roundexport.runtime.loading import open_with, products
from roundexport.runtime.machine import machine_info
from roundexport.runtime.types import EngineOptions
from roundexport.verification.activations import check_asked
from roundexport.verification.report import ActivationCost, Figure, ProductLoss, QualityReport

GOLDEN = ROOT / "tests" / "golden"
ASKED: dict[str, Any] = {"against": GOLDEN / "model", "num_samples": 3, "sample_len": 24, "progress": False}


VNNI = any("VNNI" in name for name in machine_info()["instruction_sets"])
ENGINES = {"onnx": "ort", "openvino": "ov"}


@pytest.fixture(scope="module", params=["onnx", "openvino"])
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "openvino" and not VNNI:
        pytest.skip("OpenVINO rounds activations with VNNI only")
    return Path(shutil.copytree(GOLDEN / request.param, tmp_path_factory.mktemp("activations") / request.param))


@pytest.fixture(scope="module")
def report(package: Path) -> QualityReport:
    return verify(package, activations=True, **ASKED)


def test_every_product_is_measured_alone_and_their_losses_add_up(package: Path, report: QualityReport) -> None:
    found = report.activations
    assert found is not None and found.tokens == 3 * 24 and found.spared == ()
    known = products(package, ENGINES[package.name])
    assert sorted(product.layers for product in found.products) == sorted(product.layers for product in known)
    assert ("lm_head",) in [product.layers for product in found.products]
    losses = [product.kl.mean for product in found.products]
    assert losses == sorted(losses, reverse=True) and losses[-1] > 0
    assert 0.7 < found.added / found.together.mean < 1.4
    kept = read_record(package)
    assert kept is not None and [tuple(one["layers"]) for one in kept["activations"]["products"]] == [
        product.layers for product in found.products
    ]


def test_a_loss_is_the_kl_of_two_runs_of_the_runtime(package: Path) -> None:
    ids, engine = np.random.default_rng(0).integers(4, 384, (2, 24)), ENGINES[package.name]
    every = [product.name for product in products(package, engine)]

    def logits(**options: Any) -> np.ndarray:
        return open_with(package, engine, EngineOptions(threads=1, **options)).logits(ids)  # type: ignore[union-attr]

    group = {"properties": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"}} if engine == "ov" else {}
    exact, shipped = logits(precise=True), logits(precise=engine == "ov", **group)
    assert np.array_equal(logits(precise=True, int8_products=frozenset(every)), shipped)
    first = logits(precise=True, int8_products=frozenset(every[:1]))
    assert 0 < np.abs(first - exact).max() < np.abs(shipped - exact).max()


def test_the_layers_are_named_with_their_shares(capsys: pytest.CaptureFixture[str], report: QualityReport) -> None:
    products = (
        ProductLoss(("h.0.mlp.gate_proj", "h.0.mlp.up_proj"), Figure(0.003, 1e-5)),
        ProductLoss(("lm_head",), Figure(0.001, 1e-5)),
    )
    cost = ActivationCost(512, Figure(0.0041, 0.0002), products, ("h.1.o",))
    told = replace(report, activations=cost)
    printing.qualities({"p": told})
    out = capsys.readouterr().out
    assert "8-bit activations    0.00410 ± 0.00020 nats" in out and "float32 already      h.1.o" in out
    rows = [line.split() for line in out.splitlines() if "│" in line]
    assert next(row for row in rows if "h.0.mlp.gate_proj," in row)[-3:-1] == ["75.0", "%"]
    lines = {line.name: line.value for line in accuracy.lines(json.loads(json.dumps(told.to_json())))}
    assert lines["activations in 8 bits, KL"] == "0.00410 ± 0.00020"
    assert lines["of it, products alone"] == "75.0 % h.0.mlp.gate_proj, up_proj; 25.0 % lm_head"
    assert joined(["head", "other"]) == "head, other"


def test_where_a_processor_rounds_nothing_it_is_said(capsys: pytest.CaptureFixture[str], report: QualityReport) -> None:
    cost = ActivationCost(512, Figure(0.0, 0.0), (ProductLoss(("lm_head",), Figure(0.0, 0.0)),))
    printing.qualities({"p": replace(report, activations=cost)})
    assert "cost nothing here" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    package = GOLDEN / "onnx"
    with pytest.raises(UsageError, match="leave --precise out"):
        verify(package, activations=True, precise=True, **ASKED)
    with pytest.raises(UsageError, match="leave KV_CACHE_PRECISION out"):
        verify(GOLDEN / "openvino", activations=True, properties={"KV_CACHE_PRECISION": "u8"}, **ASKED)
    with pytest.raises(UsageError, match="exceptions of precise"):
        EngineOptions(int8_products=frozenset(["a"]))
    encoder = replace(read_package(package), task="embed", pooling="mean")
    with pytest.raises(UnsupportedError, match="this package's task is embed"):
        check_asked(package, encoder, False, {})
    exact = Path(shutil.copytree(package, tmp_path / "exact"))
    (exact / "model.onnx").write_bytes(with_int8_activations((package / "model.onnx").read_bytes()))
    with pytest.raises(UnsupportedError, match=r"no product among 9 .*nothing to measure"):
        check_asked(exact, read_package(exact, check_hashes=False), False, {})
