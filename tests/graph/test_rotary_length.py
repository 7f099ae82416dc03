"""Rotary angles that depend on the length of the text: one set per package, that of transformers at its max_context."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captured_reference import Reference

from conftest import build_model
from roundexport.errors import UnsupportedError, UsageError
from roundexport.graph.capture import Capture, capture
from roundexport.graph.rotary_length import choose_angles
from roundexport.model.checkpoint import Checkpoint

LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
    "short_factor": [1 + 0.01 * i for i in range(8)], "long_factor": [1 + 0.3 * i for i in range(8)],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
PHI3 = {"max_position_embeddings": 96, "original_max_position_embeddings": 32, "rope_parameters": LONG}
LLAMA = {"max_position_embeddings": 32, "rope_parameters": DYNAMIC}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {"longrope": ("phi3", PHI3), "dynamic": ("llama", LLAMA)}

Made = tuple[Checkpoint, Capture]


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int | None], Made]:
    """``captured("dynamic", 96)``: a toy whose angles change at 32 tokens, captured for 96."""
    root, checkpoints, made = tmp_path_factory.mktemp("rotary"), {}, {}

    def get(kind: str, max_context: int | None) -> Made:
        if kind not in checkpoints:
            family, changes = KINDS[kind]
            checkpoints[kind] = Checkpoint.open(build_model(family, root / kind, **changes))
        if (kind, max_context) not in made:
            made[kind, max_context] = capture(checkpoints[kind], max_context=max_context)
        return checkpoints[kind], made[kind, max_context]

    return get


def worst_difference(made: Made, length: int) -> float:
    """Between the captured graph and transformers, without a cache, on random tokens; logits are of size one."""
    checkpoint, got = made
    ids = torch.randint(4, 384, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = checkpoint.load_model()(input_ids=ids).logits
        found = Reference(got, checkpoint).run(ids, torch.ones_like(ids), torch.arange(length)[None])
    return float((found - expected).abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("max_context", "length"), [(None, 20), (None, 32), (96, 96)], ids=["below", "at the original length", "beyond"]
)
def test_angles_are_those_of_transformers(
    captured: Callable[[str, int | None], Made], kind: str, max_context: int | None, length: int
) -> None:
    made = captured(kind, max_context)
    assert made[1].max_context == (max_context or 32)
    assert worst_difference(made, length) < 1e-5


def test_long_factors_hold_for_every_text_beyond_the_original_length(
    captured: Callable[[str, int | None], Made],
) -> None:
    assert worst_difference(captured("longrope", 96), 33) < 1e-5
    assert worst_difference(captured("longrope", 96), 32) > 1e-3, "the note says that these differ"


@pytest.mark.parametrize("kind", KINDS)
def test_the_user_is_told(captured: Callable[[str, int | None], Made], kind: str) -> None:
    (cut,), (long,) = (captured(kind, max_context)[1].notes for max_context in (None, 96))
    assert "max_context is 32" in cut and "up to 96 can be asked for" in cut
    assert "as transformers does for a text of 96 tokens" in long


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_the_model_was_made_for_is_refused(captured: Callable[[str, int | None], Made], kind: str) -> None:
    with pytest.raises(UsageError, match="max_context 97 is beyond the 96 positions"):
        capture(captured(kind, None)[0], max_context=97)


def test_nothing_is_said_where_angles_never_change(tmp_path: Path) -> None:
    short = {"original_max_position_embeddings": 96}
    model = build_model("phi3", tmp_path / "m", **{**PHI3, **short, "rope_parameters": {**LONG, **short}})
    got = capture(Checkpoint.open(model))
    assert (got.max_context, got.notes) == (96, ())


def test_angles_chosen_by_a_class_of_its_own_are_refused() -> None:
    from transformers import PhimoeConfig
    from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

    settings = {**LONG, "short_mscale": 1.0, "long_mscale": 1.2}
    config = PhimoeConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=96, rope_parameters=settings)
    model = torch.nn.Sequential(PhimoeRotaryEmbedding(config))
    model.config = config  # type: ignore[assignment]
    with pytest.raises(UnsupportedError, match="PhimoeRotaryEmbedding: its angles depend on the length"):
        choose_angles(model, 96)
