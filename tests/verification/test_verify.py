"""Quality figures against numbers worked out by hand, gates, and texts that must be refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import ROOT, tuned
from roundexport import export, verify
from roundexport.errors import ArtifactError, UsageError
from roundexport.formats.verification_record import read_record
from roundexport.model.checkpoint import Checkpoint
from roundexport.verification.decoder import measure_decoder
from roundexport.verification.encoder import measure_encoder
from roundexport.verification.gates import Gates
from roundexport.verification.report import DecoderQuality, EncoderQuality, Figure, Histogram

GOLDEN = ROOT / "tests" / "golden"
IDS = np.random.default_rng(0).integers(4, 384, (6, 40))


class Shifted:
    """An engine whose logits are the float model's with ``amount`` added to one token's everywhere."""

    def __init__(self, checkpoint: Checkpoint, amount: float) -> None:
        self.model, self.amount = checkpoint.load_model(), amount

    def logits(self, ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits = self.model(input_ids=torch.from_numpy(ids)).logits.numpy().copy()
        logits[..., 7] += self.amount
        return logits

    def greedy(self, prompts: list[list[int]], count: int) -> list[np.ndarray]:
        ids = np.array(prompts)
        for _ in range(count):
            ids = np.concatenate([ids, self.logits(ids)[:, -1].argmax(-1)[:, None]], 1)
        return list(ids[:, len(prompts[0]) :])


@pytest.mark.parametrize("asked", [{"sample_len": 0}, {"sample_len": 1}, {"num_samples": 1}, {"num_samples": 2.5}])
@pytest.mark.parametrize("package", ["onnx", "openvino"])
def test_windows_without_sense_are_refused_before_a_file_is_read(package: str, asked: dict[str, Any]) -> None:
    ((name, value),) = asked.items()
    with pytest.raises(UsageError, match=f"{name} must be a whole number of at least 2 .* not {value}"):
        verify(GOLDEN / package, against=GOLDEN / "model", **asked)


def test_a_loss_that_is_no_number_is_a_failure_without_a_gate() -> None:
    unsaid: dict[str, Any] = {"texts": 2, "cosine_min": 0.9, "rank_correlation": 1.0, "same_neighbour": 1.0}
    broken, sound = (EncoderQuality(cosine=Figure(mean, 0.1), **unsaid) for mean in (float("nan"), 0.9))
    assert Gates().failures(sound) == ()
    assert "the loss is nan: the package, or the float model, gave values" in Gates().failures(broken)[0]


def test_the_float_model_against_itself_loses_nothing(models: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    found = measure_decoder(checkpoint, Shifted(checkpoint, 0.0), IDS, horizon=8, cache=None)
    assert abs(found.kl.mean) < 1e-6 and found.top1.mean == 1.0
    assert found.perplexity == pytest.approx(found.perplexity_float, rel=1e-6)
    assert found.first_divergence == (8,) * 6


def test_kl_and_perplexity_equal_those_worked_out_from_the_logits(models: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    engine = Shifted(checkpoint, 3.0)
    found = measure_decoder(checkpoint, engine, IDS, horizon=4, cache=None)
    with torch.no_grad():
        p = checkpoint.load_model()(input_ids=torch.from_numpy(IDS)).logits.double().numpy()
    # Adding a to logit t: log q = log p + a·[v = t] - log(1 + p_t (e^a - 1)), so KL = log(1 + p_t (e^a - 1)) - a·p_t.
    p = p - np.log(np.exp(p).sum(-1, keepdims=True))
    share = np.exp(p[..., 7])
    expected = np.log1p(share * np.expm1(3.0)) - 3.0 * share
    # float32 softmax of 384 logits: about 1e-6 absolute on a KL of order 0.01.
    assert found.kl.mean == pytest.approx(expected.mean(), abs=2e-6)
    assert found.kl_max == pytest.approx(expected.max(), abs=2e-5)
    assert found.kl.stderr == pytest.approx(expected.mean(1).std(ddof=1) / np.sqrt(6), abs=2e-6)
    assert found.kl_windows == pytest.approx(expected.mean(1), abs=5e-6)
    nll = -np.take_along_axis(p[:, :-1], IDS[:, 1:, None], -1).mean()
    assert found.perplexity_float == pytest.approx(np.exp(nll), rel=1e-5)
    assert found.windows == 6 and found.tokens == 240
    histogram = found.kl_histogram
    assert histogram is not None and sum(histogram.counts) == 240
    assert sum(histogram.counts[1 + histogram.edges.index(0.01) :]) == (expected >= 0.01).sum()


def test_windows_of_two_packages_are_paired() -> None:
    windows = np.array([1.0, 2.0, 4.0, 3.0])
    same = Figure.ratio(windows / 2, windows)
    assert (same.mean, same.stderr) == (0.5, 0.0)  # however much windows differ, every one lost half
    other = Figure.ratio(windows / 2 + [0.1, -0.1, 0.1, -0.1], windows)
    assert other.mean == pytest.approx(0.5) and other.stderr == pytest.approx(0.1 * (4 / 3) ** 0.5 / 2 / 2.5)
    with pytest.raises(ValueError, match="3 values cannot be paired with 4"):
        Figure.ratio(windows[:3], windows)


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_a_package_that_does_not_fit_is_scored_in_sections(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"num_samples": 3, "sample_len": 12, "precise": True, "progress": False}
    whole = verify(GOLDEN / target, against=GOLDEN / "model", **asked)
    monkeypatch.setattr("roundexport.verification.verify.section_bytes", lambda manifest, limit: 10_000)
    cut = verify(GOLDEN / target, against=GOLDEN / "model", **asked)
    assert cut.engine["engine"].endswith("in sections") and cut.engine["section_bytes"] == 10_000
    assert isinstance(whole.quality, DecoderQuality) and isinstance(cut.quality, DecoderQuality)
    assert cut.quality.kl.mean == pytest.approx(whole.quality.kl.mean, rel=1e-4)
    assert cut.quality.top1 == whole.quality.top1 and cut.quality.perplexity_float == whole.quality.perplexity_float
    assert whole.quality.divergence_horizon > 0 == cut.quality.divergence_horizon == len(cut.quality.first_divergence)


def test_properties_of_the_plugin_change_the_figures_and_leave_the_record_alone(tmp_path: Path) -> None:
    package = Path(shutil.copytree(GOLDEN / "openvino", tmp_path / "openvino"))
    asked: dict[str, Any] = {"num_samples": 3, "sample_len": 40, "precise": True, "progress": False}
    exact = verify(package, against=GOLDEN / "model", **asked)
    short = verify(package, against=GOLDEN / "model", properties={"KV_CACHE_PRECISION": "u8"}, **asked)
    assert (exact.engine["precision"]["kv_cache"], short.engine["precision"]["kv_cache"]) == ("f32", "u8")
    assert isinstance(exact.quality, DecoderQuality) and isinstance(short.quality, DecoderQuality)
    assert exact.quality.kl.mean != short.quality.kl.mean
    verify(package, against=GOLDEN / "model", properties={"KV_CACHE_PRECISION": "u8"}, **{**asked, "precise": False})
    assert read_record(package) is None
    with pytest.raises(UsageError, match="has no property 'KV_CACHE'"):
        verify(package, against=GOLDEN / "model", properties={"KV_CACHE": "u8"}, **asked)


def test_a_histogram_counts_what_lies_below_between_and_above() -> None:
    found = Histogram.over(np.array([[0.0, -1e-9, 1e-6], [0.9999, 1.0, 50.0]]))
    assert len(found.counts) == len(found.edges) + 1 == 30
    assert found.edges[0] == 1e-6 and found.edges[-1] == 10.0
    assert found.counts[:2] == (2, 1) and found.counts[-1] == 1
    assert found.counts[found.edges.index(1.0)] == 1 and found.counts[found.edges.index(1.0) + 1] == 1


def test_standard_error_needs_two_values() -> None:
    assert Figure.over(np.array([1.0, 3.0])).stderr == pytest.approx(1.0)
    assert np.isnan(Figure.over(np.array([1.0])).stderr)


def test_encoder_figures_of_known_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = np.eye(4, dtype=np.float32) + 0.1
    monkeypatch.setattr("roundexport.verification.encoder.float_embeddings", lambda *_: reference)
    turned = reference[[1, 0, 2, 3]]
    same = measure_encoder(None, SimpleNamespace(embed=lambda _: 3 * reference), ["a"] * 4)  # type: ignore[arg-type]
    assert same.cosine.mean == pytest.approx(1.0, abs=1e-6) and same.same_neighbour == 1.0
    swapped = measure_encoder(None, SimpleNamespace(embed=lambda _: turned), ["a"] * 4)  # type: ignore[arg-type]
    assert swapped.cosine_min < 0.5 < swapped.cosine.mean


@pytest.fixture(scope="module")
def package(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of the tiny Llama, beside its artifact, both calibrated on nothing (rtn)."""
    root = tmp_path_factory.mktemp("quality")
    tuned(models("llama, one block"), root / "artifact", algorithm="rtn", group_size=32, progress=False)
    export(root / "artifact", root / "onnx", to="onnx")
    return root / "onnx"


def test_verify_checks_integers_against_the_artifact_given(
    package: Path, models: Callable[[str], Path], heldout_text: Path, tmp_path: Path
) -> None:
    model = models("llama, one block")
    good = verify(package, against=model, artifact=package.parent / "artifact", text=heldout_text,
                  num_samples=2, sample_len=32)  # fmt: skip
    assert good.integers_checked == 9 and good.text == "heldout.txt" and good.failures == ()
    tuned(model, tmp_path / "other", algorithm="rtn", bits=8, group_size=32, progress=False)
    with pytest.raises(ArtifactError, match="integers differ"):
        verify(package, against=model, artifact=tmp_path / "other", text=heldout_text, num_samples=2, sample_len=32)


def test_text_that_was_calibrated_on_is_refused(
    models: Callable[[str], Path], calibration_text: Path, tmp_path: Path
) -> None:
    model = models("llama, one block")
    tuned(model, tmp_path / "artifact", group_size=32, steps=1, num_samples=4, sample_len=32,
         calibration=str(calibration_text), progress=False)  # fmt: skip
    export(tmp_path / "artifact", tmp_path / "onnx", to="onnx")
    with pytest.raises(UsageError, match="calibrated on"):
        verify(tmp_path / "onnx", against=model, text=calibration_text, num_samples=2, sample_len=32)


def test_an_encoder_is_verified_without_a_text_too(models: Callable[[str], Path], tmp_path: Path) -> None:
    tuned(models("bert, one block"), tmp_path / "artifact", algorithm="rtn", group_size=32, progress=False)
    export(tmp_path / "artifact", tmp_path / "openvino", to="openvino")
    found = verify(tmp_path / "openvino", against=models("bert, one block"), num_samples=8)
    assert found.text == "bundled text"
    assert 0.5 < found.quality.cosine.mean < 1.0  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="gates for decoders"):
        verify(tmp_path / "openvino", against=models("bert, one block"), max_kl=0.1)
