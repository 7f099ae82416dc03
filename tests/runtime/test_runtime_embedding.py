"""Encoders on both engines: pooling by its definition, whatever the batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import runtime_toys as toys
from numpy.typing import NDArray

from roundexport.errors import ArtifactError, UsageError
from roundexport.runtime import Encoder, load
from roundexport.runtime.prompts import FILE, Prompts, read_prompts

TEXTS = [
    "The sea was calm.",
    "A",
    "An old man stood on the shore and looked long at the boats.",
    "Night fell.",
]
BUILD = {"ort": toys.onnx_encoder, "ov": toys.ov_encoder}


@pytest.fixture(params=BUILD)
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Encoder]:
    def get(**changes: object) -> Encoder:
        found = load(BUILD[request.param](tmp_path / "encoder", **changes), precise=True)
        assert isinstance(found, Encoder)
        return found

    return get


def hidden_by_hand(ids: list[int]) -> NDArray[np.float32]:
    random = toys._random(2)
    table, weight = random(toys.VOCAB, toys.HIDDEN, size=1.0), random(toys.HIDDEN, toys.HIDDEN)
    return table[ids] @ weight  # type: ignore[no-any-return]


PROMPTS = {"prompts": {"query": "Find: ", "document": ""}, "default_prompt_name": "query"}
# (arguments of embed, what stands in front of the text): the rule of SentenceTransformer.encode
ASKED: list[tuple[dict[str, str], str]] = [
    ({}, "Find: "),
    ({"prompt_name": "document"}, ""),
    ({"prompt_name": "query"}, "Find: "),
    ({"prompt": "Say: "}, "Say: "),
    ({"prompt": ""}, ""),
]


@pytest.mark.parametrize(("asked", "front"), ASKED)
def test_a_prompt_stands_in_front_of_every_text(asked: dict[str, str], front: str, tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / FILE).write_text(json.dumps(PROMPTS))
    engine = load(toys.onnx_encoder(tmp_path / "encoder"))
    assert isinstance(engine, Encoder)
    wanted = [engine.tokenizer.encode(front + text) for text in TEXTS]
    assert [row[row != toys.PAD].tolist() for row in engine.encode(TEXTS, **asked)["input_ids"]] == wanted
    assert np.array_equal(engine.embed(TEXTS, **asked), engine.embed_ids(wanted))


def test_prompts_that_are_not_there_are_refused(tmp_path: Path) -> None:
    found = Prompts({"query": "Find: "})
    assert found.choose(None, None) == ""
    for prompt, name, why in ((None, "title", "no prompt named 'title'; the model has query"), ("a", "query", "both")):
        with pytest.raises(UsageError, match=why):
            found.choose(prompt, name)
    rows = [
        ({"prompts": []}, None),
        ({"prompts": ["a"]}, "map names"),
        ({"prompts": {"a": 1}}, "map names"),
        ({"default_prompt_name": "a"}, "not among"),
    ]
    for content, why in rows:
        (tmp_path / FILE).write_text(json.dumps(content))
        if why is None:
            assert read_prompts(tmp_path / FILE) == Prompts()
            continue
        with pytest.raises(ArtifactError, match=why):
            read_prompts(tmp_path / FILE)


@pytest.mark.parametrize("mode", ["mean", "cls", "last", "max", "mean_sqrt_len", "weightedmean"])
@pytest.mark.parametrize("normalize", [True, False])
def test_embeddings_are_the_pooled_hidden_states(encoder: Callable[..., Encoder], mode: str, normalize: bool) -> None:
    engine = encoder(pooling={"mode": mode, "normalize": normalize})
    found = engine.embed(TEXTS, batch_size=3)
    for text, row in zip(TEXTS, found, strict=True):
        hidden = hidden_by_hand(engine.tokenizer.encode(text))
        places = np.arange(1, len(hidden) + 1, dtype=np.float32)
        wanted = {
            "mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1], "max": hidden.max(0),
            "mean_sqrt_len": hidden.sum(0) / np.sqrt(len(hidden)), "weightedmean": places @ hidden / places.sum(),
        }[mode]  # fmt: skip
        wanted = wanted / np.linalg.norm(wanted) if normalize else wanted
        # Sums of 32 products and of at most 40 rows in float32: relative 1e-6 of values around 2.
        assert np.abs(row - wanted).max() < 1e-5
    assert found.dtype == np.float32 and found.shape == (len(TEXTS), toys.HIDDEN)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_the_batch_size_changes_nothing(encoder: Callable[..., Encoder], batch_size: int) -> None:
    engine = encoder()
    assert np.abs(engine.embed(TEXTS, batch_size) - engine.embed(TEXTS, 4)).max() < 1e-6


def test_inputs_are_padded_on_the_right(encoder: Callable[..., Encoder]) -> None:
    engine = encoder()
    inputs = engine.encode(["A", TEXTS[0]])
    lengths = [len(engine.tokenizer.encode(t)) for t in ("A", TEXTS[0])]
    assert inputs["attention_mask"].sum(1).tolist() == lengths
    assert inputs["attention_mask"][0, 0] == 1 and (inputs["input_ids"][0, lengths[0] :] == toys.PAD).all()
    assert engine.pool(engine.hidden(inputs), inputs["attention_mask"]).shape == (2, toys.HIDDEN)


def test_long_texts_are_cut(encoder: Callable[..., Encoder]) -> None:
    engine = encoder(max_context=16)
    assert engine.encode(["sea " * 100])["input_ids"].shape == (1, 16)


def test_a_sentence_length_below_the_context_is_respected(tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "sentence_bert_config.json").write_text('{"max_seq_length": 7}')
    engine = load(toys.onnx_encoder(tmp_path / "encoder"))
    assert isinstance(engine, Encoder) and engine.encode(["sea " * 100])["input_ids"].shape == (1, 7)


def test_no_texts_give_no_rows(encoder: Callable[..., Encoder]) -> None:
    assert encoder().embed([]).shape == (0, toys.HIDDEN)


def test_senseless_calls_are_refused(encoder: Callable[..., Encoder]) -> None:
    engine = encoder()
    with pytest.raises(UsageError, match="list of texts"):
        engine.embed("one text")
    with pytest.raises(UsageError, match="batch_size"):
        engine.embed(TEXTS, batch_size=0)
    with pytest.raises(UsageError, match="no tokens"):
        engine.embed([""])
