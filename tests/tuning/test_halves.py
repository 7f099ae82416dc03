"""Tuning a model with an encoder and a decoder: both halves, the decoder on what the encoder gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tuned
from roundexport.errors import UnsupportedError
from roundexport.formats.artifact import Artifact
from roundexport.model.block_call import capture_calls, first_hidden
from roundexport.model.blocks import Part, Stack, find_stack
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.dequantized_model import DequantizedModel
from roundexport.model.half_runs import DecoderAlone, numbers_of

SMALL = {"num_samples": 6, "sample_len": 24, "batch_size": 4, "bits": 3, "group_size": 32}


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_decoders_block_by_itself_is_the_models(models: Callable[[str], Path], family: str) -> None:
    model: Any = Checkpoint.open(models(family)).load_model()
    generator = torch.Generator().manual_seed(1)
    source, answers = (torch.randint(4, 384, (3, length), generator=generator) for length in (13, 9))
    with torch.no_grad():
        states = model.get_encoder()(input_ids=source)[0]
        wanted = model(input_ids=source, decoder_input_ids=answers, output_hidden_states=True).decoder_hidden_states
    whole = find_stack(model)
    part = whole.parts[1]
    stack = Stack((Part(part.name, 0, part.stop - part.start),), whole.blocks[part.start : part.stop])
    decoder = DecoderAlone(model, states, answers)
    calls = capture_calls(decoder, stack, numbers_of(3))
    hidden = torch.cat([first_hidden(decoder, stack, numbers_of(3), 2), states], 1)
    for block, call in zip(stack.blocks, calls, strict=True):
        with torch.no_grad():
            hidden = call.run(block, hidden)
    assert torch.equal(hidden[:, 9:], states)
    if family == "bart":  # T5's last hidden states are behind a norm
        assert torch.allclose(hidden[:, :9], wanted[-1], atol=1e-5)
    else:
        assert torch.allclose(model.decoder.final_layer_norm(hidden[:, :9]), wanted[-1], atol=1e-5)


def test_gram_lowers_the_loss_of_both_halves(
    models: Callable[[str], Path], calibration_text: Path, tmp_path: Path
) -> None:
    model = models("bart, one block")
    made = {
        name: tuned(model, tmp_path / name, algorithm=name, calibration=str(calibration_text), **SMALL)
        for name in ("gram", "rtn")
    }
    opened = {name: Artifact.open(path) for name, path in made.items()}
    losses = {entry.info.name: (entry.loss_before, entry.loss_after) for entry in opened["gram"].manifest.layers}
    for name in ("encoder.layers.0.fc1", "decoder.layers.0.encoder_attn.k_proj", "decoder.layers.0.self_attn.q_proj"):
        before, after = losses[f"model.{name}"]
        assert before is not None and after is not None and after < before, name
    checkpoint, inputs = Checkpoint.open(model), {}
    generator = torch.Generator().manual_seed(3)
    for name, length in (("input_ids", 20), ("decoder_input_ids", 15)):
        inputs[name] = torch.randint(4, 384, (4, length), generator=generator)
    with torch.no_grad():
        wanted = checkpoint.load_model()(**inputs).logits
    found = {name: DequantizedModel(own, checkpoint).run(inputs) for name, own in opened.items()}
    assert (found["gram"] - wanted).square().mean() < (found["rtn"] - wanted).square().mean()


def test_a_killed_run_goes_on_between_the_halves(
    models: Callable[[str], Path], calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from roundexport.tuning import block_loop

    model, asked = models("t5"), {"algorithm": "gram", "calibration": str(calibration_text), **SMALL}
    whole = tuned(model, tmp_path / "whole", **asked)
    run = block_loop.run_task
    for killed_at in (2, 3):
        calls = iter(range(10))

        def dies(task: Any, context: Any, at: int = killed_at, calls: Any = calls) -> Any:
            if next(calls) == at - (0 if at == 2 else 2):
                raise MemoryError
            return run(task, context)

        monkeypatch.setattr(block_loop, "run_task", dies)
        with pytest.raises(MemoryError):
            tuned(model, tmp_path / "parts", **asked)
    monkeypatch.setattr(block_loop, "run_task", run)
    parts = Artifact.open(tuned(model, tmp_path / "parts", **asked))
    for name in parts.names():
        assert parts.linear(name).equals(Artifact.open(whole).linear(name)), name


def test_methods_that_measure_blocks_are_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="algorithm signround"):
        tuned(models("bart, one block"), tmp_path / "a", **SMALL)
