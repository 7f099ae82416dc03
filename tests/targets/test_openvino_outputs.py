"""OpenVINO packages of every family and scheme give the numbers of the dequantized model."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from greedy_reading import likeliest, reader
from openvino_tools import (
    EXACT,
    INT4,
    Package,
    make_artifact,
    run_steps,
    usual,
)
from safetensors.torch import load_file, save_file

from conftest import DECODERS, ENCODERS, FAMILIES, build_model, scheme_per_layer
from roundexport.formats.package import read_package
from roundexport.quant.spec import QuantSpec
from roundexport.targets import openvino as target

# Both sides compute in float32 and differ in the order of sums only: relative 2^-24 a term, a few hundred terms a sum,
# some ten sums in a row; 1e-6 was the most seen on values of about 1 (logits) to 4 (hidden states).
TOLERANCE = 1e-5


def padded_batch(package: Package, lengths: tuple[int, ...], seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens in rows of these lengths: a decoder's are padded on the left, an encoder's on the right."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(width - length, None) if package.decodes else slice(0, length)] = 1
    feed = {
        "input_ids": torch.randint(4, 380, (len(lengths), width), generator=generator),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "token_type_ids": torch.zeros_like(mask),
    }
    return {name: tensor.numpy() for name, tensor in feed.items()}


def expected_output(package: Package, feed: dict[str, np.ndarray]) -> np.ndarray:
    model = package.reference
    ids, mask, positions = (torch.from_numpy(feed[k]) for k in ("input_ids", "attention_mask", "position_ids"))
    with torch.no_grad():
        if package.decodes:
            return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.numpy()
        return model(input_ids=ids, attention_mask=mask).last_hidden_state.numpy()


def assert_close(got: np.ndarray, expected: np.ndarray, mask: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """Compare the rows of real tokens; no row at all may be NaN."""
    assert got.shape == expected.shape and not np.isnan(got).any()
    difference = np.abs(got - expected)[mask.astype(bool)]
    print(f"max {difference.max():.2e} mean {difference.mean():.2e}")
    assert difference.max() < tolerance


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("lengths", [(1,), (17,), (13, 8, 1)], ids=["one", "seventeen", "batch"])
def test_prefill_then_single_steps_give_the_models_logits(
    openvino_packages, family: str, lengths: tuple[int, ...]
) -> None:
    package = openvino_packages(family)
    feed = padded_batch(package, lengths)
    width = max(lengths)
    cuts = [width - 3, width - 2, width - 1] if width > 3 else []
    got = run_steps(package.compiled, feed, cuts)
    assert_close(got, expected_output(package, feed), feed["attention_mask"])


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_give_the_models_hidden_states(openvino_packages, family: str) -> None:
    package = openvino_packages(family)
    feed = padded_batch(package, (40, 23, 1))  # longer than ModernBERT's window
    assert_close(run_steps(package.compiled, feed, []), expected_output(package, feed), feed["attention_mask"])


WIDE = [QuantSpec(3, 64, True), QuantSpec(3, 32, False), QuantSpec(4, None, False), QuantSpec(8, 32, False),
        QuantSpec(4, 32, True, "float32")]  # fmt: skip

NARROW = [QuantSpec(2, 32, True), QuantSpec(2, 16, False), QuantSpec(2, 32, False)]


# A layer for each scheme in one graph; every form's bytes are held one by one in test_openvino_weights.py.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("schemes", "device", "table"),
    [
        (WIDE + NARROW, "cpu", NARROW[1]),
        (WIDE + NARROW, "gpu", WIDE[1]),
        (WIDE[:4], "cpu", WIDE[4]),
    ],
    ids=["all", "gpu", "no 2 bits"],
)
def test_every_scheme_gives_the_models_logits(
    models, tmp_path: Path, schemes: list[QuantSpec], device: str, table: QuantSpec
) -> None:
    settings = target.OpenVinoSettings(device=device)
    model = models("qwen3" if len(schemes) > 4 else "qwen3, one block")  # a block has four products
    package = Package(model, tmp_path, scheme_per_layer(schemes, table), settings)  # the tied table too
    assert {package.artifact.entry(name).spec for name in package.artifact.names()} == {*schemes, table}
    feed = padded_batch(package, (9, 4))
    assert_close(run_steps(package.compiled, feed, [7, 8]), expected_output(package, feed), feed["attention_mask"])
    stored = {layer["stored"] for layer in read_package(package.folder).layers.values()}
    options = ov.Core().read_model(package.folder / "openvino_model.xml").get_rt_info()
    narrow = any(scheme.bits == 2 for scheme in schemes)
    assert ("u2" in stored) == ("runtime_options" in options) == (narrow and device == "cpu")
    if "u2" in stored:
        # Without it the vendor's pipelines fail at the first inference on bfloat16 machines.
        assert options["runtime_options"]["DYNAMIC_QUANTIZATION_GROUP_SIZE"].astype(str) == "0"


def test_a_bfloat16_checkpoint_kept_float_loses_nothing(models, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models("qwen3"), folder)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    package = Package(folder, tmp_path, lambda info: None if info.kind == "embedding" else INT4)
    feed = padded_batch(package, (9, 4))
    assert_close(run_steps(package.compiled, feed, [8]), expected_output(package, feed), feed["attention_mask"])
    assert dict(package.report.kept_float) == dict.fromkeys(("lm_head", "model.embed_tokens"), "not in the artifact")
    constants = [n for n in ov.Core().read_model(package.folder / "openvino_model.xml").get_ops()
                 if n.get_type_name() == "Constant" and list(n.shape) == [384, 64]]  # fmt: skip
    assert [n.get_element_type().get_type_name() for n in constants] == ["bf16"]  # once, for both


def test_overridden_norms_are_in_the_graph(openvino_packages, tmp_path: Path) -> None:
    plain, name = openvino_packages("llama"), "model.norm.weight"
    doubled = {name: plain.checkpoint.float32(name) * 2}
    artifact = make_artifact(plain.checkpoint, tmp_path / "artifact", usual, doubled)
    (tmp_path / "double").mkdir()
    target.export(artifact, plain.checkpoint, tmp_path / "double", target.OpenVinoSettings())
    double = ov.Core().compile_model(tmp_path / "double" / "openvino_model.xml", "CPU", EXACT)
    ids = np.arange(4, 12)[None]
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(8)[None]}
    expected = 2 * run_steps(plain.compiled, feed, [])
    np.testing.assert_allclose(run_steps(double, feed, []), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_soft_capped_attention_is_spelled_out_with_the_reason(tmp_path: Path, monkeypatch) -> None:
    values = {**FAMILIES["gemma3"][2], "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0}
    monkeypatch.setitem(FAMILIES, "gemma2", ("Gemma2Config", "Gemma2ForCausalLM", values))
    package = Package(build_model("gemma2", tmp_path / "model"), tmp_path)
    assert [rule for rule, _ in package.report.refused] == ["attention", "attention"]
    assert "caps its attention logits" in package.report.refused[0][1]
    feed = padded_batch(package, (13, 8, 1))
    assert_close(run_steps(package.compiled, feed, [9, 10]), expected_output(package, feed), feed["attention_mask"])


def test_float_layers_of_a_conv1d_model_are_turned_right(models, tmp_path: Path) -> None:
    # attn.c_proj is square: its shape does not show that GPT-2 stores it [K, N].
    package = Package(models("gpt2, one block"), tmp_path, lambda info: None if "attn" in info.name else usual(info))
    feed = padded_batch(package, (9, 4))
    assert_close(run_steps(package.compiled, feed, [8]), expected_output(package, feed), feed["attention_mask"])
    assert ("transformer.h.0.attn.c_proj", "not in the artifact") in package.report.kept_float


@pytest.mark.parametrize("length", [1, 17, 300])
def test_trained_model_continues_with_the_same_tokens(openvino_packages, length: int) -> None:
    """Greedy decoding with the KV cache against the whole sequence read by torch, token for token."""
    ids = np.random.default_rng(length).integers(4, 4096, (1, length))
    package = openvino_packages("sample")
    request = package.compiled.create_infer_request()
    tokens, past, new = [], 0, ids
    for _ in range(12):
        total = past + new.shape[1]
        request.infer({
            "input_ids": new, "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(past, total)[None], "beam_idx": np.zeros(1, np.int32),
        })  # fmt: skip
        tokens.append(int(request.get_output_tensor(0).data[0, -1].argmax()))
        past, new = total, np.array([[tokens[-1]]])
    assert tokens == likeliest(reader(package.reference), ids[0].tolist(), tokens)


def test_minilm_embeds_as_the_dequantized_model(openvino_packages) -> None:
    package = openvino_packages("minilm")
    feed = padded_batch(package, (60, 17, 2))
    feed["input_ids"] = np.random.default_rng(0).integers(1000, 30000, feed["input_ids"].shape)
    # Twelve products of K = 384 and 1536 in a row: four times the terms of the tiny models.
    assert_close(
        run_steps(package.compiled, feed, []), expected_output(package, feed), feed["attention_mask"], 4 * TOLERANCE
    )
    manifest = read_package(package.folder)
    assert manifest.pooling == {"mode": "mean", "normalize": True}
    found = target.read_back(package.folder)
    assert all(found[name].equals(package.artifact.linear(name)) for name in package.artifact.names())
