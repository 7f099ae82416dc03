"""`tune` from model folder to artifact: what is in it, for every family, and what is printed meanwhile."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tuning_tools import QUICK, Models, contents

from conftest import DECODERS, FAMILIES, tuned
from roundexport.algorithms.rounding import signround
from roundexport.calibration.samples import load_calibration
from roundexport.formats.artifact import Artifact
from roundexport.kernels import round_to_nearest
from roundexport.model import streamed_model
from roundexport.model.blocks import weight_of
from roundexport.model.checkpoint import Checkpoint
from roundexport.quant.spec import QuantSpec
from roundexport.targets.float_artifact import write_float_artifact


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_tuned_whole(family: str, models: Models, tmp_path: Path) -> None:
    out = tuned(models(family), tmp_path / "out", **{**QUICK, "steps": 30})
    artifact = Artifact.open(out)
    model = Checkpoint.open(models(family)).load_model()
    inside = re.compile(r"^(.*\.)?(layers?|h)\.\d+\.")
    for name, module in model.named_modules():
        matrix = isinstance(module, torch.nn.Linear | torch.nn.Embedding) or type(module).__name__ == "Conv1D"
        if matrix and inside.match(name):
            assert artifact.entry(name).spec == QuantSpec(4, 32, True), name
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [e for e in artifact.manifest.layers if e.spec.bits == 8]
    assert tables[0].info.kind == "embedding" and tables[0].info.out_features == len(table.weight)
    tied = head is not None and head.weight is table.weight
    assert tables[0].info.shared_with == (("lm_head",) if tied else ())
    assert len(tables) == (2 if family in DECODERS and not tied else 1)
    losses = [(e.loss_before, e.loss_after) for e in artifact.manifest.layers if e.spec.bits == 4]
    assert all(before is not None and after < before for before, after in losses)
    assert not list(tmp_path.glob("*.partial*"))


def test_what_stays_float_is_named_with_a_reason(models: Models, tmp_path: Path) -> None:
    kept = dict(Artifact.open(tuned(models("bert"), tmp_path / "bert", **QUICK)).manifest.kept_float)
    assert kept["embeddings.position_embeddings"] == "a small table outside the blocks"
    assert kept["pooler.dense"] == "outside the blocks"
    out = tuned(models("llama"), tmp_path / "llama", embedding_bits=None, **QUICK)
    kept = dict(Artifact.open(out).manifest.kept_float)
    assert kept == {"model.embed_tokens": "embedding_bits is none", "lm_head": "embedding_bits is none"}


def test_tables_are_rounded_to_nearest_at_their_own_bits(models: Models, tmp_path: Path) -> None:
    artifact = Artifact.open(tuned(models("llama"), tmp_path / "out", embedding_bits=4, **QUICK))
    model = Checkpoint.open(models("llama")).load_model()
    for name in ("model.embed_tokens", "lm_head"):
        expected = round_to_nearest.run(weight_of(model.get_submodule(name)), QuantSpec(4, 32, True))
        assert artifact.linear(name).equals(expected)


def test_rtn_needs_no_samples_and_equals_plain_rounding(models: Models, tmp_path: Path) -> None:
    out = tuned(models("gpt2"), tmp_path / "out", algorithm="rtn", bits=3, group_size=32, progress=False)
    artifact = Artifact.open(out)
    assert artifact.manifest.calibration == {"kind": "none"}
    assert artifact.manifest.algorithm["name"] == "rtn"
    model = Checkpoint.open(models("gpt2")).load_model()
    name = "transformer.h.1.mlp.c_proj"
    expected = round_to_nearest.run(weight_of(model.get_submodule(name)), QuantSpec(3, 32, False))
    assert artifact.linear(name).equals(expected), "3 bits default to asymmetric"


def test_manifest_says_how_it_was_made(models: Models, calibration_text: Path, tmp_path: Path) -> None:
    out = tuned(models("qwen3"), tmp_path / "out", calibration=str(calibration_text), seed=5, **QUICK)
    manifest = Artifact.open(out).manifest
    checkpoint = Checkpoint.open(models("qwen3"))
    assert manifest.source["digest"] == checkpoint.digest and manifest.source["model_type"] == "qwen3"
    assert manifest.algorithm == {
        "name": "signround",
        "settings": {
            "steps": 6,
            "batch_size": 4,
            "learning_rate": None,
            "seed": 5,
            "device": "cpu",
            "precision": "float32",
        },
    }
    samples = load_calibration(checkpoint, str(calibration_text), num_samples=6, sample_len=32, seed=5)
    assert manifest.calibration == samples.identity
    assert {"torch", "transformers", "numpy", "roundexport"} == manifest.versions.keys()
    assert "tokenizer.json" in manifest.files


def test_same_seed_same_bytes_and_another_seed_others(models: Models, tmp_path: Path) -> None:
    first, second = (contents(tuned(models("gemma3"), tmp_path / n, **QUICK)) for n in ("a", "b"))
    assert first == second
    other = contents(tuned(models("gemma3"), tmp_path / "c", seed=43, **QUICK))
    assert other["quantized-00001-of-00001.safetensors"] != first["quantized-00001-of-00001.safetensors"]


def test_blocks_see_the_quantized_prefix_and_aim_at_the_float_one(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    original = signround.tune_block

    def spy(block: Any, inputs: Any, *rest: Any) -> Any:
        seen.append((inputs, original(block, inputs, *rest)))
        return seen[-1][1]

    monkeypatch.setattr(signround, "METHOD", dataclasses.replace(signround.METHOD, tune_block=spy))
    tuned(models("llama"), tmp_path / "out", **QUICK)
    checkpoint = Checkpoint.open(models("llama"))
    ids = torch.from_numpy(load_calibration(checkpoint, "self", num_samples=6, sample_len=32).ids)
    floats = states(checkpoint.load_model(), ids)
    quantized_model = checkpoint.load_model().requires_grad_(False)
    artifact = Artifact.open(tmp_path / "out")
    for name in artifact.names():
        weight_of(quantized_model.get_submodule(name)).copy_(torch.from_numpy(artifact.linear(name).dequantize()))
    quantized = states(quantized_model, ids)
    for index, (inputs, _) in enumerate(seen):
        # The same forward in batches of another size: float32 roundings of values of order 1.
        for found, expected in (
            (inputs.float_inputs, floats[index]),
            (inputs.quantized_inputs, quantized[index]),
            (inputs.target, floats[index + 1]),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        # Padding (id 1, which a random model draws now and then) and the last position do not count.
        assert torch.equal(inputs.mask[:, :-1], (ids[:, :-1] != 1).float()) and not inputs.mask[:, -1].any()


def states(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states before block 0, 1 and after the last, before the final norm."""
    found: list[torch.Tensor] = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model.model.layers[-1].register_forward_hook(lambda _, __, out: found.append(out))
    with torch.no_grad():
        model(input_ids=ids)
    return found


def test_float_artifact_quantizes_nothing(models: Models, tmp_path: Path) -> None:
    artifact = Artifact.open(write_float_artifact(Checkpoint.open(models("phi3")), tmp_path / "out"))
    assert artifact.names() == []
    assert "model.layers.0.mlp.gate_up_proj" in dict(artifact.manifest.kept_float)


def test_a_model_that_is_loaded_whole_gives_the_same_bytes(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(tuned(models("llama"), tmp_path / "streamed", **QUICK))
    monkeypatch.setattr(streamed_model, "_skeleton", lambda checkpoint: None)
    assert contents(tuned(models("llama"), tmp_path / "whole", **QUICK)) == expected


def test_progress_says_what_it_will_take_and_what_each_block_gained(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned(models("llama"), tmp_path / "out", **{**QUICK, "progress": True})
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(
        r"16 layers in 2 blocks, int4 g32 sym, 4.500 bits per weight; about \d+ s and \d\.\d GiB",
        err.replace("\n", " "),
    )
    assert re.search(r"model\.layers\.1\s+loss \S+ → \S+\s+[\d.]+ s\s+peak [\d.]+ GiB", err)


def test_without_progress_nothing_is_printed(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned(models("llama"), tmp_path / "out", **QUICK)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "method",
    [
        {"algorithm": "gram"},
        {"algorithm": "signround"},
        {"algorithm": "signroundv2"},
        {"algorithm": "rtn", "steps": None},
        {"algorithm": "gram", "finish": "end_to_end"},
        {"algorithm": "rtn", "transform": "teq"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kept", [0, 1])
def test_a_block_that_rules_keep_float_is_passed_through(
    method: dict[str, str | None], kept: int, models: Models, calibration_text: Path, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps([{"match": rf"layers\.{kept}\.", "keep_float": True}]))
    asked = {"rules": str(rules), "calibration": str(calibration_text), **QUICK, **method}
    artifact = Artifact.open(tuned(models("llama"), tmp_path / "out", **asked))
    inside = [name for name in artifact.names() if ".layers." in name]
    assert inside and all(f".layers.{1 - kept}." in name for name in inside)
    assert len(artifact.manifest.kept_float) == 7
