"""Calibration samples: cut from text, written by a decoder, drawn from an encoder's vocabulary; and their identity."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from roundexport.calibration import self_generated
from roundexport.calibration import text as calibration_texts
from roundexport.calibration.samples import ids_digest, load_calibration
from roundexport.calibration.self_generated import beginnings, draw_tokens, write_samples, written_samples
from roundexport.calibration.text import encoder_of
from roundexport.errors import Interrupted, UnsupportedError, UsageError
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.positions import positions_of

Models = Callable[[str], Path]


def test_text_is_cut_into_samples_of_one_stream(models: Models, calibration_text: Path) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    found = load_calibration(checkpoint, str(calibration_text), num_samples=5, sample_len=40)
    stream = encoder_of(checkpoint)(calibration_text.read_text(encoding="utf-8")[:4000], False)
    assert found.ids.shape == (5, 40) and found.ids.dtype == np.int64 and not found.notes
    np.testing.assert_array_equal(found.ids.ravel(), stream[:200])
    assert found.identity == {
        "kind": "text",
        "file": calibration_text.name,
        "text_sha256": hashlib.sha256(calibration_text.read_bytes()).hexdigest(),
        "ids_sha256": ids_digest(found.ids),
        "num_samples": 5,
        "sample_len": 40,
        "seed": 42,
    }


def test_reading_a_part_of_a_long_text_gives_the_ids_of_the_whole(calibration_text: Path, models: Models) -> None:
    encode = encoder_of(Checkpoint.open(models("llama")))
    text = calibration_text.read_text(encoding="utf-8")[:60_000]
    whole = encode(text, False)
    assert calibration_texts.encode_enough(encode, text, 900)[:900] == whole[:900]
    assert calibration_texts.encode_enough(encode, text, 10**9) == whole


def test_text_shorter_than_one_sample_is_refused_with_both_numbers(models: Models, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("one two three", encoding="utf-8")
    checkpoint = Checkpoint.open(models("llama"))
    tokens = len(encoder_of(checkpoint)("one two three", False))
    with pytest.raises(UsageError, match=rf"found {tokens} tokens, one sample takes 64"):
        load_calibration(checkpoint, str(text), num_samples=4, sample_len=64)


def test_fewer_samples_than_asked_are_used_and_said(models: Models, tmp_path: Path) -> None:
    text = tmp_path / "few.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 10, encoding="utf-8")
    found = load_calibration(Checkpoint.open(models("llama")), str(text), num_samples=1000, sample_len=16)
    assert 1 <= len(found.ids) < 1000 and found.identity["num_samples"] == len(found.ids)
    assert f"holds {len(found.ids)} samples of 16 tokens; 1000 were asked for" in found.notes[0]


def test_samples_are_no_longer_than_the_model(models: Models, calibration_text: Path) -> None:
    found = load_calibration(Checkpoint.open(models("bert")), str(calibration_text), num_samples=2, sample_len=100_000)
    assert found.ids.shape == (2, 512) and "512 positions" in found.notes[0]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 1024}, 1024),
        ({"n_positions": 256}, 256),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({}, 4096),
    ],
)
def test_positions_of_a_model(config: dict, expected: int) -> None:
    assert positions_of(config) == expected


@pytest.mark.parametrize("source", ["no/such/file.txt", "nothing"])
def test_a_source_that_is_nothing_is_refused(source: str, models: Models) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_calibration(Checkpoint.open(models("llama")), source)


def test_text_that_is_not_utf8_is_refused(models: Models, tmp_path: Path) -> None:
    text = tmp_path / "latin.txt"
    text.write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(UsageError, match="UTF-8"):
        load_calibration(Checkpoint.open(models("llama")), str(text))


def test_counts_without_sense_are_refused(models: Models) -> None:
    with pytest.raises(UsageError, match="at least 1 sample"):
        load_calibration(Checkpoint.open(models("llama")), "self", num_samples=0)


@pytest.mark.parametrize(("count", "length"), [(2, 0), (2, 2), (2, -1), (0, 8)])
def test_samples_without_room_for_text_are_refused_and_do_not_hang(count: int, length: int) -> None:
    def encode(text: str, special: bool) -> list[int]:
        return [*([1] if special else []), *map(ord, text), *([2] if special else [])]

    with pytest.raises(UsageError, match=f"a text: asked for {count} samples of {length} tokens, 2 of which are the"):
        calibration_texts.cut_samples(encode, lambda _: "some text " * 100, "a text", count, length)
    found = calibration_texts.cut_samples(encode, lambda _: "some text " * 100, "a text", 2, 3)
    assert found.tolist() == [[1, ord("s"), 2], [1, ord("o"), 2]]


# --- written by the model


def test_a_decoder_writes_the_same_samples_for_the_same_seed(models: Models) -> None:
    checkpoint = Checkpoint.open(models("qwen3"))
    first, second, other = (
        load_calibration(checkpoint, "self", num_samples=3, sample_len=24, seed=seed) for seed in (7, 7, 8)
    )
    np.testing.assert_array_equal(first.ids, second.ids)
    assert first.identity == second.identity and first.identity["kind"] == "self"
    assert not np.array_equal(first.ids, other.ids)
    assert (first.ids[:, 0] == 0).all() and first.ids.shape == (3, 24)


def test_writing_follows_the_models_distribution(models: Models) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    model = checkpoint.load_model()
    ids = write_samples(model, checkpoint, beginnings(checkpoint, 4000, 2), length=2, seed=1)
    with torch.no_grad():
        likely = torch.softmax(model(input_ids=torch.zeros(1, 1, dtype=torch.long)).logits[0, -1], -1).numpy()
    counts = np.bincount(ids[:, 1], minlength=len(likely)) / len(ids)
    # Binomial: five standard deviations of the most likely tokens' frequency over 4000 draws.
    top = likely.argsort()[-20:]
    assert (np.abs(counts - likely)[top] <= 5 * np.sqrt(likely[top] / len(ids))).all()


def test_writing_with_a_cache_is_writing_without(models: Models) -> None:
    checkpoint = Checkpoint.open(models("gemma3"))
    model = checkpoint.load_model()
    ids = torch.from_numpy(write_samples(model, checkpoint, beginnings(checkpoint, 2, 20), length=20, seed=3))
    generator = torch.Generator().manual_seed(3)
    row = ids[:, :1]
    with torch.no_grad():
        for _ in range(19):
            logits = model(input_ids=row, use_cache=False).logits[:, -1]
            row = torch.cat([row, draw_tokens(logits, generator)[:, None]], 1)
    assert torch.equal(row, ids)


def test_a_model_without_a_first_token_is_refused(models: Models) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    checkpoint.tokens = {"bos": None, "eos": (), "pad": None}
    with pytest.raises(UsageError, match="no bos or eos token"):
        beginnings(checkpoint, 1, 8)


@pytest.mark.parametrize("vocabulary", [5, 256, 257, 1000])
def test_drawing_inverts_the_cumulative_distribution(vocabulary: int) -> None:
    logits = torch.randn(64, vocabulary, generator=torch.Generator().manual_seed(1)) * 3
    logits[:, ::3] = -torch.inf
    drawn = draw_tokens(logits, torch.Generator().manual_seed(2))
    cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
    points = torch.rand(64, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * cumulative[:, -1:]
    assert torch.equal(drawn, torch.searchsorted(cumulative, points, right=True)[:, 0])


def test_what_was_written_once_is_not_written_again(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUNDEXPORT_CACHE", str(tmp_path))
    checkpoint = Checkpoint.open(models("llama"))
    shares: list[float] = []
    first = written_samples(checkpoint, 3, 16, 5, report=lambda share, _: shares.append(share))
    assert first.identity == {"source": "sampled from the model at temperature 1"}
    assert shares == sorted(shares) and 0.9 < shares[-1] <= 1
    monkeypatch.setattr(self_generated, "write_samples", lambda *_: pytest.fail("written again"))
    np.testing.assert_array_equal(written_samples(checkpoint, 3, 16, 5).ids, first.ids)
    with pytest.raises(pytest.fail.Exception):
        written_samples(checkpoint, 3, 16, 6)


class Stub:
    def __init__(self, worth: bool, error: Exception | None = None) -> None:
        self.worth, self.error = worth, error

    def called(self, *_: object) -> str:
        return "stub"

    def worth_it(self, *_: object) -> bool:
        return self.worth

    def __call__(self, checkpoint: Checkpoint, begun: np.ndarray, length: int, *_: object) -> np.ndarray:
        if self.error is not None:
            raise self.error
        return np.full((len(begun), length), 7)


@pytest.mark.parametrize(
    ("writer", "by"),
    [(Stub(True), "stub"), (Stub(False), "model at"), (Stub(True, UnsupportedError("not this one")), "model at")],
)
def test_a_writer_writes_where_it_is_worth_it_and_can(
    writer: Stub, by: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUNDEXPORT_CACHE", str(tmp_path))
    told: list[str] = []
    found = written_samples(Checkpoint.open(models("llama")), 2, 8, 1, writer=writer, say=told.append)
    assert by in found.identity["source"] and (found.ids == 7).all() == (by == "stub")
    assert found.identity.get("instead_of") == ("stub" if writer.error else None)
    assert ["its stub cannot: not this one" in line for line in told] == [True] * (writer.error is not None)


def test_ctrl_c_while_a_writer_works_is_not_a_writer_that_cannot(models: Models, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        written_samples(Checkpoint.open(models("llama")), 2, 8, 1, writer=Stub(True, Interrupted("stopped")))


# --- drawn from a vocabulary


def test_an_encoder_gets_ordinary_tokens_frequent_ones_more_often(models: Models) -> None:
    found = load_calibration(Checkpoint.open(models("modernbert")), "self", num_samples=64, sample_len=128)
    assert found.identity["kind"] == "vocabulary" and "1/(rank + 2.7)" in found.identity["source"]
    assert found.ids.min() >= 4, "ids 0 to 3 are the special tokens"
    counts = np.bincount(found.ids.ravel(), minlength=384)
    assert counts[4:24].sum() > 5 * counts[204:224].sum() > 0


def test_samples_are_framed_as_the_tokenizer_frames_a_text(
    models: Models, tmp_path: Path, calibration_text: Path
) -> None:
    import shutil

    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    folder = tmp_path / "framed"
    shutil.copytree(models("bert"), folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<cls> $A <sep>", special_tokens=[("<cls>", 2), ("<sep>", 3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    checkpoint = Checkpoint.open(folder)
    for source in ("self", str(calibration_text)):
        ids = load_calibration(checkpoint, source, num_samples=3, sample_len=16).ids
        assert ids.shape == (3, 16) and (ids[:, 0] == 2).all() and (ids[:, -1] == 3).all()
        assert not np.isin(ids[:, 1:-1], [0, 1, 2, 3]).any()


# --- datasets


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load: Callable[..., object]) -> None:
    module = ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_dataset_gives_its_training_text(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> object:
        asked.append((name, config, split, streaming))
        return ({"id": i, "content": f"record {i} of the set"} for i in range(10**9))

    fake_datasets(monkeypatch, load)
    checkpoint = Checkpoint.open(models("llama"))
    found = load_calibration(checkpoint, "owner/name:small", num_samples=4, sample_len=32)
    assert asked == [("owner/name", "small", "train", True)]
    expected = encoder_of(checkpoint)("\n\n".join(f"record {i} of the set" for i in range(40)), False)
    np.testing.assert_array_equal(found.ids.ravel(), expected[:128])
    assert found.identity["kind"] == "dataset" and found.identity["dataset"] == "owner/name:small"


def test_a_dataset_without_a_text_column_is_refused_with_its_columns(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_datasets(monkeypatch, lambda *_, **__: iter([{"question": "?", "answer": "!"}]))
    with pytest.raises(UsageError, match="question, answer"):
        load_calibration(Checkpoint.open(models("llama")), "owner/name")


def test_a_dataset_that_cannot_be_reached_is_a_clear_error(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> object:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)\nmore lines")

    fake_datasets(monkeypatch, load)
    with pytest.raises(UsageError, match=r"could not be read: Couldn't reach .*; with no network, give a text file"):
        load_calibration(Checkpoint.open(models("llama")), "owner/name")


def test_a_missing_datasets_package_says_what_to_install(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"install roundexport\[datasets\]"):
        load_calibration(Checkpoint.open(models("llama")), "owner/name")
