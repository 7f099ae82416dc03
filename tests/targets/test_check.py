"""What an export would refuse is found from the config alone, and before anything is tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import build_model
from roundexport import TuneSettings, conversion, inspect
from roundexport.errors import UnsupportedError, UsageError
from roundexport.graph.capture import Capture
from roundexport.model.checkpoint import Checkpoint
from roundexport.targets.check import dry_run
from roundexport.targets.interface import load_target

BOTH = ("onnx", "openvino")


@pytest.fixture(scope="module")
def odd_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX Runtime wants head widths that are multiples of 8; OpenVINO takes any."""
    return build_model("llama", tmp_path_factory.mktemp("odd") / "m", head_dim=20)


def test_what_can_be_exported_passes(models: Callable[[str], Path]) -> None:
    found = dry_run(Checkpoint.open(models("modernbert")), BOTH)
    assert found.refused == {} and found.notes == ()


def test_one_target_refuses_and_the_other_does_not(odd_heads: Path) -> None:
    found = dry_run(Checkpoint.open(odd_heads), BOTH)
    assert list(found.refused) == ["onnx"] and "head_dim 20 is not a multiple of 8" in found.refused["onnx"]


def test_inspect_says_who_takes_a_model_and_who_does_not(odd_heads: Path) -> None:
    facts = inspect(odd_heads).facts
    assert facts["exports to"] == "openvino" and "head_dim 20 is not a multiple of 8" in facts["onnx refuses"]


def test_equal_blocks_are_lowered_once(models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def noting(captured: Capture) -> None:
        asked.append(len(captured.attentions))

    target = replace(load_target("onnx"), check=noting)
    monkeypatch.setattr("roundexport.targets.check.load_target", lambda _: target)
    dry_run(Checkpoint.open(models("llama")), ["onnx"])
    assert asked == [1]


def test_what_no_target_can_have_is_said_once(tmp_path: Path) -> None:
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=384, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    FalconForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="cannot be exported to onnx and openvino: Falcon"):
        conversion.convert(tmp_path, tmp_path / "out", progress=False)


@pytest.mark.slow
def test_an_operator_without_translation_is_named(tmp_path: Path) -> None:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, vocab_size_per_layer_input=384, hidden_size_per_layer_input=16, laurel_rank=8,
        num_kv_shared_layers=0, activation_sparsity_pattern=[0.95], layer_types=["full_attention"], pad_token_id=1,
    )  # fmt: skip
    Gemma3nForCausalLM(config).save_pretrained(tmp_path)
    found = dry_run(Checkpoint.open(tmp_path), BOTH)
    assert list(found.refused) == ["onnx"] and "prims.erf_inv" in found.refused["onnx"]


def test_an_unknown_target_is_a_usage_error(models: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="unknown target"):
        dry_run(Checkpoint.open(models("llama")), ["tflite"])


def test_convert_asks_before_it_tunes(odd_heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "tune", lambda *_, **__: pytest.fail("tuned before it was known to be in vain"))
    with pytest.raises(UnsupportedError, match=r"onnx: attention layer 0: head_dim 20.* --to openvino "):
        conversion.convert(odd_heads, tmp_path / "out", TuneSettings(), to="onnx,openvino", progress=False)
    assert not (tmp_path / "out").exists()
