"""Integer encoders of models: calibrated by block statistics, near the float model, stored and read back the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import tuned
from roundexport.errors import ArtifactError, RoundexportError, UnsupportedError, UsageError
from roundexport.formats.artifact import Artifact
from roundexport.integer_encoder import files, sensitivity, shifts
from roundexport.integer_encoder.calibrate import IntegerSettings, Stage, calibrate
from roundexport.integer_encoder.embedder import Embedder
from roundexport.integer_encoder.float_encoder import TABLES, FloatEncoder
from roundexport.integer_encoder.rounders import ForIntegers, FromArtifact
from roundexport.integer_encoder.table_schemes import table_spec
from roundexport.kernels import integer_encoder
from roundexport.kernels._block_format import Format
from roundexport.kernels.integer_encoder import IntegerEncoder
from roundexport.model.checkpoint import Checkpoint
from roundexport.quant.int8_tensor import Int8Tensor
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

EIGHT = QuantSpec(8, None, True, "exponent8")


@pytest.fixture(scope="module")
def checkpoint(models: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.open(str(models("bert")))


@pytest.fixture(scope="module")
def floating(checkpoint: Checkpoint) -> FloatEncoder:
    return FloatEncoder.of(checkpoint)


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(4, 384, (16, 12))


@pytest.fixture(scope="module")
def integers(floating: FloatEncoder, ids: np.ndarray) -> IntegerEncoder:
    return calibrate(floating, ids, ForIntegers(), IntegerSettings(block=8))


def batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    mask = (np.arange(10) < random.integers(2, 11, (6, 1))).astype(np.int64)
    return random.integers(4, 384, (6, 10)), mask, np.zeros((6, 10), np.int64)


def hidden(encoder: IntegerEncoder, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
    return encoder.leaving.values(integer_encoder.run(*map(torch.from_numpy, inputs), encoder).numpy())


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt(np.square(a).sum() * np.square(b).sum()))


def test_the_float_side_is_the_models(checkpoint: Checkpoint, floating: FloatEncoder) -> None:
    tokens, mask, types = map(torch.from_numpy, batch())
    with torch.no_grad():
        expected = checkpoint.load_model()(input_ids=tokens, attention_mask=mask, token_type_ids=types)
        got = floating(tokens, mask, types)
    seen = mask.bool()
    torch.testing.assert_close(got[seen], expected.last_hidden_state[seen], rtol=1e-4, atol=1e-5)


def test_simulation_and_reference_agree_and_are_near_the_float_model(
    floating: FloatEncoder, integers: IntegerEncoder
) -> None:
    inputs = batch()
    codes = integer_encoder.reference(*inputs, integers)
    assert np.array_equal(integer_encoder.run(*map(torch.from_numpy, inputs), integers).numpy(), codes)
    seen = inputs[1].astype(bool)
    with torch.no_grad():
        exact = floating(*map(torch.from_numpy, inputs)).numpy()
    assert cosine(integers.leaving.values(codes)[seen], exact[seen]) > 0.97


def test_with_weights_of_eight_bits_little_is_lost(floating: FloatEncoder, ids: np.ndarray) -> None:
    encoder = calibrate(
        floating, ids, ForIntegers(EIGHT, lambda rows, width: EIGHT), IntegerSettings(block=4, sum_bits=16)
    )
    inputs = batch()
    seen = inputs[1].astype(bool)
    with torch.no_grad():
        exact = floating(*map(torch.from_numpy, inputs)).numpy()
    assert cosine(hidden(encoder, inputs)[seen], exact[seen]) > 0.9985


def test_weights_of_an_artifact_are_taken_as_they_are(
    floating: FloatEncoder, ids: np.ndarray, models: Callable[[str], Path], calibration_text: Path, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"calibration": str(calibration_text), "num_samples": 4, "sample_len": 16}
    tuned(models("bert"), tmp_path / "a", algorithm="bct", group_size=None, **common)
    artifact = Artifact.open(tmp_path / "a")
    encoder = calibrate(floating, ids, FromArtifact(artifact))
    for index, block in enumerate(encoder.blocks):
        assert block.down.weight.equals(artifact.linear(floating.linear(index, "down")))
        bias = artifact.vectors()[f"{floating.linear(index, 'down')}.bias"]
        assert np.array_equal(block.down.bias.codes, bias.codes)
    tuned(models("bert"), tmp_path / "b", algorithm="rtn", group_size=32, **common)
    with pytest.raises(ArtifactError, match=r"has no 'embeddings\.\w+'; tune with --everything"):
        calibrate(floating, ids, FromArtifact(Artifact.open(tmp_path / "b")))


def test_the_tables_metric_leads_errors_to_where_they_cost_less(floating: FloatEncoder, ids: np.ndarray) -> None:
    metric = sensitivity.of_embeddings(floating, ids)
    found = ForIntegers().tables(floating, ids)[TABLES[0]].dequantize()
    weight = floating.weights[f"{TABLES[0]}.weight"].numpy()
    nearest = ForIntegers(table_damping=1.0).tables(floating, ids)[TABLES[0]].dequantize()
    cost, more = (np.einsum("rc,cd,rd->", e, metric.numpy(), e) for e in (found - weight, nearest - weight))
    assert cost < more
    assert np.square(found - weight).sum() > np.square(nearest - weight).sum()


def test_positions_take_up_what_words_and_types_lack(floating: FloatEncoder, ids: np.ndarray) -> None:
    framed = ids.copy()
    framed[:, 0] = 7
    found = {name: table.dequantize() for name, table in ForIntegers().tables(floating, framed).items()}
    word, position, kind = (floating.weights[f"{name}.weight"].numpy() - found[name] for name in TABLES)
    lacks = word[framed].mean(0) + position[: framed.shape[1]] + kind[0]
    alone = word[framed].mean(0) + kind[0]
    assert np.square(lacks[0]).sum() < 0.5 * np.square(alone[0]).sum()  # all of the first token's
    metric = sensitivity.of_embeddings(floating, framed).numpy()
    common, before = lacks[1:].mean(0), alone[1:].mean(0)
    assert common @ metric @ common < 0.5 * (before @ metric @ before)


def test_tables_of_few_rows_have_small_groups() -> None:
    sizes = ((2, 384), (512, 384), (30522, 384), (512, 24))
    assert [table_spec(*size).group_size for size in sizes] == [16, 32, None, None]


def test_a_linear_mends_what_its_output_is_added_to() -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight, lost = (torch.randn(shape, generator=generator) for shape in ((32, 16, 8), (6, 8), (6, 8)))
    side = Stage({"a": (weight, torch.zeros(6))}, x, x, x @ (0.3 * lost).t() + 0.5)
    weights, bias = ForIntegers(EIGHT).stage(side)["a"]
    assert np.abs(weights.dequantize() - (weight + 0.3 * lost).numpy()).max() < 0.05
    assert np.abs(bias.values() - 0.5).max() < 0.05


def test_only_sums_before_a_norm_have_something_to_mend(floating: FloatEncoder, ids: np.ndarray) -> None:
    class Spy(ForIntegers):
        def stage(self, stage: Stage) -> Mapping[str, tuple[QuantizedLinear, Int8Tensor]]:
            seen.extend((name, stage.residual) for name in stage.weights)
            return super().stage(stage)

    seen: list[tuple[str, torch.Tensor | None]] = []
    calibrate(floating, ids[:8], Spy(EIGHT), IntegerSettings(block=8))
    mended = {name for name, residual in seen if residual is not None}
    blocks = range(floating.layers)
    assert mended == {floating.linear(index, tensor) for index in blocks for tensor in ("output", "down")}
    with torch.no_grad():
        embedded = floating.embed(torch.from_numpy(ids[:8]), torch.zeros(8, 12, dtype=torch.long))
    first = next(residual for _, residual in seen if residual is not None)
    assert 0 < float(first.square().mean()) < 0.1 * float(embedded.square().mean())


# --- files


def test_a_file_holds_all_of_it_and_nothing_in_float(integers: IntegerEncoder, tmp_path: Path) -> None:
    size = files.save(integers, tmp_path / "e.safetensors")
    assert size == (tmp_path / "e.safetensors").stat().st_size
    again = files.read(tmp_path / "e.safetensors")
    inputs = tuple(map(torch.from_numpy, batch()))
    assert torch.equal(integer_encoder.run(*inputs, again), integer_encoder.run(*inputs, integers))
    from roundexport.storage.safetensors_reader import TensorFile

    file = TensorFile(tmp_path / "e.safetensors")
    assert {file.dtype(name) for name in file.names} == {"U8", "I8", "U16"}


def test_damaged_files_are_refused(integers: IntegerEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "e.safetensors"
    files.save(integers, path)
    other = files.integer_attention.reciprocal_table() + 1
    monkeypatch.setattr(files.integer_attention, "reciprocal_table", lambda: other)
    with pytest.raises(ArtifactError, match="table reciprocal is not what this machine computes"):
        files.read(path)
    monkeypatch.setattr(files, "FORMAT", "another")
    with pytest.raises(ArtifactError, match="not an integer encoder"):
        files.read(path)


# --- formats by block statistics


def test_a_rare_outlier_is_clipped_and_its_block_is_finer() -> None:
    values = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    values[7, 0] = 10.0
    values[:, 4:] *= 16
    found = shifts.fit(values, 4)
    assert found.exponents.tolist() == [-4, -1]
    assert shifts.fit(values, 4, spread=2).exponents.tolist() == [-3, -1]
    assert shifts.fit(torch.zeros(4, 8), 4).exponents.tolist() == [0, 0]
    with pytest.raises(RoundexportError, match="not finite"):
        shifts.fit(values * np.inf, 4)
    codes = shifts.codes(values, found)
    assert np.array_equal(codes.numpy(), found.codes(values.numpy()))
    assert np.array_equal(shifts.rounded(values, found).numpy(), found.values(codes.numpy().astype(np.int32)))


def test_blocks_that_do_not_divide_become_the_next_smaller_divisor() -> None:
    assert [shifts.divisor(384, most) for most in (1, 5, 32, 100, 1000)] == [1, 4, 32, 96, 384]
    with pytest.raises(UsageError):
        shifts.divisor(8, 0)


# --- whole texts, and what is refused


def test_texts_become_vectors(checkpoint: Checkpoint, integers: IntegerEncoder, floating: FloatEncoder) -> None:
    texts = ["one small text", "another text that is longer than the first one", "a third"]
    exact = Embedder.of(checkpoint, lambda *inputs: floating(*inputs).numpy()).embed(texts, batch_size=2)
    found = Embedder.of_integers(checkpoint, integers).embed(texts, batch_size=2)
    assert found.shape == exact.shape and all(cosine(a, b) > 0.95 for a, b in zip(found, exact, strict=True))


def test_what_is_no_bert_is_refused(models: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedError, match="made of BERT models, this is 'modernbert'"):
        FloatEncoder.of(Checkpoint.open(str(models("modernbert"))))
    with pytest.raises(UsageError, match="8 or 16"):
        IntegerSettings(sum_bits=12)
    with pytest.raises(RoundexportError):
        Format(8, np.zeros(0, np.int8))
