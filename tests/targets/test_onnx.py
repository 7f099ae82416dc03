"""ONNX packages of every family against transformers on the dequantized weights, with the cache, and the proof."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_support import (
    Decoder,
    dequantized_model,
    genai_greedy,
    greedy,
    relative_rms,
    session,
    write_artifact,
    write_package,
)

from conftest import DECODERS, ENCODERS, FAMILIES, SMALL, build_model, scheme_per_layer
from roundexport.errors import ArtifactError, UsageError
from roundexport.formats.artifact import Artifact
from roundexport.formats.package import read_package
from roundexport.model.checkpoint import Checkpoint
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.targets.onnx import OnnxSettings, export, read_back, refusal
from roundexport.targets.onnx.export import prove

# At level 0 everything is float32: about 20 operations in a row with sums of at most 512 terms, each off by up to
# sqrt(512) * 2**-24 = 1.4e-6 of its rms at worst correlation of none, sqrt(20) * 1.4e-6 = 6e-6 together.
EXACT = 1e-5
# At level 4 every linear rounds its input to int8 per block (7e-3 of its rms, see test_onnx_weight_layout.py); two
# blocks have four linears in a row each, the head comes last: sqrt(9) * 7e-3 = 2.1e-2, and outliers add to it.
ROUNDED = 5e-2

Made = tuple[Artifact, Path]


@pytest.fixture
def packages(packages: Callable[[str, str], tuple[Path, Path]]) -> Callable[[str], Made]:
    """``packages("llama")``: artifact (4 bits, group 32, embeddings 8 bits per row) and its ONNX package."""

    def get(family: str) -> Made:
        artifact, package = packages(family, "onnx")
        return Artifact.open(artifact), package

    return get


def sample(vocab: int, batch: int = 2, length: int = 12) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(3).integers(4, vocab, (batch, length))
    mask = np.ones((batch, length), np.int64)
    mask[1:, length - 3 :] = 0  # the second row is three tokens shorter
    return ids, mask


def reference(artifact: Artifact, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        out = dequantized_model(artifact)(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize(("accuracy_level", "limit"), [(0, EXACT), (4, ROUNDED)])
def test_decoder_logits_are_those_of_the_dequantized_model(
    packages: Callable[[str], Made], family: str, accuracy_level: int, limit: float
) -> None:
    artifact, package = packages(family)
    ids, mask = sample(FAMILIES[family][2]["vocab_size"])
    logits = Decoder(session(package, accuracy_level), len(ids)).run(ids, mask)
    real = mask.astype(bool)
    assert relative_rms(logits[real], reference(artifact, ids, mask)[real]) < limit


@pytest.mark.parametrize("family", DECODERS)
def test_prefill_and_steps_equal_full_recomputation(packages: Callable[[str], Made], family: str) -> None:
    graph = session(packages(family)[1], 0)
    ids, _ = sample(FAMILIES[family][2]["vocab_size"], batch=1, length=16)
    whole = Decoder(graph, 1).run(ids, np.ones_like(ids))
    stepped = Decoder(graph, 1)
    parts = [stepped.run(ids[:, :9], np.ones((1, 9), np.int64))]
    parts += [stepped.run(ids[:, n : n + 1], np.ones((1, n + 1), np.int64)) for n in range(9, 16)]
    assert relative_rms(np.concatenate(parts, 1), whole) < EXACT


@pytest.mark.parametrize("family", DECODERS)
def test_rows_padded_on_the_right_decode_as_if_alone(packages: Callable[[str], Made], family: str) -> None:
    graph = session(packages(family)[1], 0)
    ids, _ = sample(FAMILIES[family][2]["vocab_size"], batch=2, length=14)
    lengths, steps = np.array([9, 5]), 4
    together = Decoder(graph, 2)
    mask = (np.arange(9) < lengths[:, None]).astype(np.int64)
    together.run(np.where(mask, ids[:, :9], 1), mask)
    rows = []
    for step in range(steps):
        counts = lengths + step + 1
        mask = (np.arange(9 + step + 1) < counts[:, None]).astype(np.int64)
        rows.append(together.run(np.stack([ids[row, counts[row] - 1 : counts[row]] for row in range(2)]), mask))
    for row in range(2):
        alone = Decoder(graph, 1).run(
            ids[row : row + 1, : lengths[row] + steps], np.ones((1, lengths[row] + steps), np.int64)
        )
        got = np.concatenate([logits[row] for logits in rows])
        assert relative_rms(got, alone[0, lengths[row] :]) < EXACT


@pytest.mark.parametrize("family", DECODERS)
def test_genai_loads_the_folder_and_finds_the_same_tokens(packages: Callable[[str], Made], family: str) -> None:
    package, prompt = packages(family)[1], np.array([[5, 6, 7, 8, 9, 10, 11]], np.int64)
    got, expected = genai_greedy(package, prompt, 16), greedy(package, prompt, 16)
    # min_length keeps the end-of-sequence token out, which plain greedy decoding does not do: compare up to it.
    end = next((i for i, token in enumerate(expected[7:], 7) if token == 0), len(expected))
    assert got[:end] == expected[:end] and len(got) == 23


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize(("accuracy_level", "limit"), [(0, EXACT), (4, ROUNDED)])
def test_encoder_states_are_those_of_the_dequantized_model(
    packages: Callable[[str], Made], family: str, accuracy_level: int, limit: float
) -> None:
    artifact, package = packages(family)
    ids, mask = sample(FAMILIES[family][2]["vocab_size"], length=24)  # longer than ModernBERT's window
    graph = session(package, accuracy_level)
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    hidden = graph.run(None, {value.name: feed[value.name] for value in graph.get_inputs()})[0]
    real = mask.astype(bool)
    assert relative_rms(hidden[real], reference(artifact, ids, mask)[real]) < limit


@pytest.mark.parametrize("family", ENCODERS)
def test_padding_of_encoders_may_be_anywhere(packages: Callable[[str], Made], family: str) -> None:
    artifact, package = packages(family)
    ids, mask = sample(384, length=24)
    mask[0, 2:7] = 0
    graph = session(package, 0)
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    hidden = graph.run(None, {value.name: feed[value.name] for value in graph.get_inputs()})[0]
    real = mask.astype(bool)
    assert relative_rms(hidden[real], reference(artifact, ids, mask)[real]) < EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_integers_read_back_are_those_of_the_artifact(packages: Callable[[str], Made], family: str) -> None:
    artifact, package = packages(family)
    found = read_back(package)
    assert sorted(found) == sorted(artifact.names())
    assert all(found[name].equals(artifact.linear(name)) for name in found)


SCHEMES = [
    QuantSpec(2, 16, False), QuantSpec(2, 64, True), QuantSpec(3, 32, False), QuantSpec(3, None, True),
    QuantSpec(4, None, False), QuantSpec(4, 64, False, "float32"), QuantSpec(8, 16, True), QuantSpec(8, None, False),
]  # fmt: skip


# A layer for each scheme in one graph; every form's bytes are held one by one in test_onnx_weight_layout.py.
@pytest.mark.parametrize(
    ("schemes", "table"),
    [(SCHEMES[:4], SCHEMES[0]), (SCHEMES[4:], SCHEMES[5]), (SCHEMES[4:], SCHEMES[7])],
    ids=["narrow", "float32 table", "8-bit table"],
)
def test_every_scheme_gives_the_dequantized_model(
    models: Callable[[str], Path], tmp_path: Path, schemes: list[QuantSpec], table: QuantSpec
) -> None:
    model = models("qwen3, one block")
    artifact = write_artifact(model, tmp_path / "artifact", scheme_per_layer(schemes, table), table)
    assert {artifact.entry(name).spec for name in artifact.names()} == set(schemes)
    write_package(artifact, tmp_path / "package")
    found = read_back(tmp_path / "package")
    assert all(found[name].equals(artifact.linear(name)) for name in artifact.names())
    ids, mask = sample(384)
    logits = Decoder(session(tmp_path / "package", 0), len(ids)).run(ids, mask)
    real = mask.astype(bool)
    assert relative_rms(logits[real], reference(artifact, ids, mask)[real]) < EXACT


def test_linears_that_were_not_tuned_stay_float_with_a_reason(models: Callable[[str], Path], tmp_path: Path) -> None:
    artifact = write_artifact(
        models("qwen3, one block"), tmp_path / "artifact", QuantSpec(4, 32), keep_float=("down_proj", "k_proj")
    )
    report = write_package(artifact, tmp_path / "package")
    kept = dict(report.kept_float)
    assert {"lm_head", "model.embed_tokens", "model.layers.0.mlp.down_proj"} <= set(kept) and all(kept.values())
    assert set(report.exported) == set(artifact.names()) and not set(kept) & set(artifact.names())
    assert len(report.exported) + len(kept) == 7 + 2, "seven linears, the table and the head"
    graph = onnx.load(tmp_path / "package" / "model.onnx", load_external_data=False).graph
    tables = [tensor.name for tensor in graph.initializer if list(tensor.dims) == [384, 64]]
    assert tables == ["model.embed_tokens.weight"], "a tied float table is stored once"
    ids, mask = sample(384)
    logits = Decoder(session(tmp_path / "package", 0), len(ids)).run(ids, mask)
    real = mask.astype(bool)
    assert relative_rms(logits[real], reference(artifact, ids, mask)[real]) < EXACT


def test_a_model_without_tuned_layers_exports_as_it_is(models: Callable[[str], Path], tmp_path: Path) -> None:
    artifact = write_artifact(models("gpt2, one block"), tmp_path / "artifact", QuantSpec(4, 32), keep_float=("c_",))
    report = write_package(artifact, tmp_path / "package")
    assert report.exported == () and read_back(tmp_path / "package") == {}
    ids, mask = sample(384)
    logits = Decoder(session(tmp_path / "package", 0), len(ids)).run(ids, mask)
    real = mask.astype(bool)
    assert relative_rms(logits[real], reference(artifact, ids, mask)[real]) < EXACT


def test_graph_has_one_node_per_task(packages: Callable[[str], Made]) -> None:
    manifest = read_package(packages("llama")[1])
    assert manifest.fusions["packed qkv"] == manifest.fusions["grouped-query attention"] == 2
    assert manifest.fusions["rotary in attention"] == 2 and manifest.fusions["skip norm"] == 4
    graph = onnx.load(packages("llama")[1] / "model.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulNBits") == 2 * 4 + 1, "q, k, v are one, gate and up are one"
    assert "Reshape" not in kinds and "Transpose" not in kinds
    assert [value.name for value in graph.input][:3] == ["input_ids", "attention_mask", "past_key_values.0.key"]
    assert "position_ids" in [value.name for value in onnx.load(packages("gpt2")[1] / "model.onnx").graph.input]


def test_tied_embedding_and_head_read_one_weight(packages: Callable[[str], Made]) -> None:
    graph = onnx.load(packages("qwen3")[1] / "model.onnx", load_external_data=False).graph
    wide = [tensor.name for tensor in graph.initializer if tensor.dims and tensor.dims[0] == 384]
    assert sorted(wide) == ["model.embed_tokens.codes", "model.embed_tokens.scales"]
    readers = {node.op_type for node in graph.node if set(node.input) & set(wide)}
    assert readers == {"MatMulNBits", "Reshape", "GatherBlockQuantized"}


def test_two_exports_are_the_same_bytes(packages: Callable[[str], Made], tmp_path: Path) -> None:
    artifact, package = packages("gemma3")
    write_package(artifact, tmp_path / "again")
    for path in sorted(package.iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_a_flipped_byte_in_a_weight_fails_the_proof(packages: Callable[[str], Made], tmp_path: Path) -> None:
    artifact, package = packages("llama")
    shutil.copytree(package, tmp_path / "package")
    model = onnx.load(tmp_path / "package" / "model.onnx", load_external_data=False)
    codes = next(t for t in model.graph.initializer if t.name == "model.layers.1.mlp.down_proj.codes")
    offset = int({entry.key: entry.value for entry in codes.external_data}["offset"])
    data = tmp_path / "package" / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[offset + 5] ^= 1
    data.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"layers\.1\.mlp\.down_proj"):
        prove(artifact, {tmp_path / "package" / "model.onnx": tuple(artifact.names())})


def test_max_context_sizes_the_rotary_tables(models: Callable[[str], Path], tmp_path: Path) -> None:
    artifact = write_artifact(models("llama, one block"), tmp_path / "artifact", QuantSpec(4, 32))
    write_package(artifact, tmp_path / "package", max_context=128)
    graph = onnx.load(tmp_path / "package" / "model.onnx", load_external_data=False).graph
    assert [list(t.dims) for t in graph.initializer if t.name.startswith("rotary")] == [[128, 8], [128, 8]]
    assert read_package(tmp_path / "package").max_context == 128
    config = json.loads((tmp_path / "package" / "genai_config.json").read_text())
    assert config["model"]["context_length"] == 128 and config["search"]["max_length"] == 128
    with pytest.raises(UsageError, match="512 positions"):
        (tmp_path / "longer").mkdir()
        checkpoint = Checkpoint.open(artifact.manifest.source["location"])
        export(artifact, checkpoint, tmp_path / "longer", OnnxSettings(max_context=4096))


def test_settings_refuse_what_they_cannot_mean() -> None:
    for wrong in ({"accuracy_level": 2}, {"max_context": 0}, {"device": "gpu"}):
        with pytest.raises(UsageError):
            OnnxSettings(**wrong)


def test_target_refuses_a_weight_beyond_two_gibibytes() -> None:
    table = LinearInfo("embed", 8192, 1 << 19, "embedding")
    assert "MiB" in str(refusal(table, QuantSpec(4, 32))) and refusal(table, QuantSpec(2, 32)) is None


MORE = {
    # logit soft-capping in grouped-query attention, and a window on every other layer
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**SMALL, "head_dim": 32, "sliding_window": 8},
        "rotary in attention",
    ),
    # half of each head turned, inside the attention operator
    "phi": (
        "PhiConfig",
        "PhiForCausalLM",
        {**SMALL, "num_attention_heads": 2, "num_key_value_heads": 2},
        "rotary in attention",
    ),
    # an encoder with fewer key heads than query heads
    "eurobert": ("EuroBertConfig", "EuroBertModel", {**SMALL, "bos_token_id": None}, "attention in plain operators"),
}


@pytest.mark.parametrize("family", MORE)
def test_lowerings_that_the_seven_families_do_not_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    *built, rule = MORE[family]
    monkeypatch.setitem(FAMILIES, family, tuple(built))
    model = build_model(family, tmp_path / "model")
    artifact = write_artifact(model, tmp_path / "artifact", QuantSpec(4, 32), QuantSpec(8, None))
    report = write_package(artifact, tmp_path / "package")
    assert report.fusions[rule] == 2
    ids, mask = sample(384, length=24)
    graph = session(tmp_path / "package", 0)
    if family == "eurobert":
        got = np.asarray(graph.run(None, {"input_ids": ids, "attention_mask": mask})[0])
    else:
        got = Decoder(graph, len(ids)).run(ids, mask)
    real = mask.astype(bool)
    assert relative_rms(got[real], reference(artifact, ids, mask)[real]) < EXACT
