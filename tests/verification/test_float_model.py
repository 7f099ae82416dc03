"""The float model block by block: the very figures of the whole model, at the price of one walk, remembered."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import DECODERS
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.streamed_model import StreamedModel
from roundexport.storage.tensor_cache import TensorCache
from roundexport.verification import float_model
from roundexport.verification.decoder import measure_decoder
from roundexport.verification.float_model import FloatModel

Models = Callable[[str], Path]
IDS = np.random.default_rng(0).integers(4, 384, (6, 40))


class Noisy:
    """An engine that is the float model with noise on its logits, always the same."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.model = checkpoint.load_model()

    def logits(self, ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits = self.model(input_ids=torch.from_numpy(ids)).logits.numpy()
        return logits + 0.3 * np.sin(np.arange(logits.shape[-1]) + 7.0 * np.abs(logits[..., :1])).astype(np.float32)

    def greedy(self, prompts: list[list[int]], count: int) -> list[np.ndarray]:
        ids = np.array(prompts)
        for _ in range(count):
            ids = np.concatenate([ids, self.logits(ids)[:, -1].argmax(-1)[:, None]], 1)
        return list(ids[:, len(prompts[0]) :])


def logits_of(model: FloatModel, ids: np.ndarray) -> np.ndarray:
    states = model.states(ids)[0]
    with model.logits_of(states) as found:
        return np.stack([np.concatenate([part.numpy() for _, part in found.of_window(i)]) for i in range(len(ids))])


@pytest.mark.parametrize("family", DECODERS)
def test_logits_equal_those_of_the_whole_model(family: str, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_model, "STATES_BYTES", 3 * 4 * 64 * 40)  # rounds of three windows
    monkeypatch.setattr(float_model, "_BATCH_TOKENS", 80)
    monkeypatch.setattr(float_model, "_LOGITS_BYTES", 4 * 384 * 7)
    checkpoint = Checkpoint.open(models(family))
    with torch.no_grad():
        whole = checkpoint.load_model()(input_ids=torch.from_numpy(IDS)).logits.float().numpy()
    np.testing.assert_allclose(logits_of(FloatModel(checkpoint, cache=None), IDS), whole, atol=2e-6)


def test_figures_are_those_of_the_whole_models_logits(models: Models) -> None:
    checkpoint = Checkpoint.open(models("qwen3"))
    engine = Noisy(checkpoint)
    found = measure_decoder(checkpoint, engine, IDS, horizon=6, cache=None)
    ids = torch.from_numpy(IDS)
    with torch.no_grad():
        p = torch.log_softmax(engine.model(input_ids=ids).logits.float(), -1)
        q = torch.log_softmax(torch.from_numpy(engine.logits(IDS)).float(), -1)
        written = ids[:, :32]
        for _ in range(6):
            likeliest = engine.model(input_ids=written).logits[:, -1].argmax(-1)
            written = torch.cat([written, likeliest[:, None]], 1)
    kl = (p.exp() * (p - q)).sum(-1).numpy()
    nll = -p[:, :-1].gather(-1, ids[:, 1:, None]).mean().item()
    assert kl.mean() > 1e-3
    assert found.kl.mean == pytest.approx(kl.mean(), abs=1e-5) and found.kl_max == pytest.approx(kl.max(), abs=1e-5)
    assert found.top1.mean == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=1e-9)
    assert found.nll_float.mean == pytest.approx(nll, abs=1e-5)
    assert found.perplexity_float == pytest.approx(np.exp(nll), rel=1e-5)
    ours = np.stack(engine.greedy(IDS[:, :32].tolist(), 6))
    assert found.first_divergence == tuple(int(n) for n in np.cumprod(written[:, 32:].numpy() == ours, axis=1).sum(1))
    assert min(found.first_divergence) < 6, "the noise is large enough to be seen"


def test_a_second_run_walks_through_no_block(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUNDEXPORT_CACHE", str(tmp_path))
    checkpoint, cache = Checkpoint.open(models("llama")), TensorCache("float-states")
    first = logits_of(FloatModel(checkpoint, cache=cache), IDS)
    monkeypatch.setattr(float_model, "_last_hidden", lambda *_: pytest.fail("the blocks ran again"))
    np.testing.assert_array_equal(logits_of(FloatModel(checkpoint, cache=cache), IDS), first)
    with pytest.raises(pytest.fail.Exception):
        logits_of(FloatModel(checkpoint, cache=cache), IDS[::-1].copy())
    with pytest.raises(pytest.fail.Exception):
        logits_of(FloatModel(Checkpoint.open(models("qwen3")), cache=cache), IDS)


def test_one_block_is_in_memory_at_a_time(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    most = [0]
    take = StreamedModel._take

    def counting(self: StreamedModel, block: torch.nn.Module, device: torch.device) -> None:
        take(self, block, device)
        loaded = sum(not next(other.parameters()).is_meta for other in self.stack.blocks)
        most[0] = max(most[0], loaded)

    monkeypatch.setattr(StreamedModel, "_take", counting)
    FloatModel(Checkpoint.open(models("llama")), cache=None).states(IDS)
    assert most == [1]


def test_a_model_that_is_loaded_whole_gives_the_same(models: Models) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    whole = FloatModel(checkpoint, cache=None)
    whole._weights = StreamedModel(checkpoint, whole=True)
    np.testing.assert_array_equal(logits_of(whole, IDS), logits_of(FloatModel(checkpoint, cache=None), IDS))


def test_hidden_states_are_held_once(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_model, "_BATCH_TOKENS", 80)  # two windows
    model, left, alive = FloatModel(Checkpoint.open(models("llama")), cache=None), list[Any](), list[int]()

    def ended(_: object, __: object, output: Any) -> None:
        alive.append(sum(reference() is not None for reference in left))
        left.append(weakref.ref(output[0] if isinstance(output, tuple) else output))

    with model.weights.stack.blocks[-1].register_forward_hook(ended):
        model.states(IDS)
    assert len(alive) > 2 and max(alive) <= 1, "what was kept is held by its forward too"
