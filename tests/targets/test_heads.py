"""Models with a head on both runtimes: logits equal transformers', in a padded batch of three; what is made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import ENCODER, FAMILIES, SMALL, _tokenizer, tuned
from roundexport import export, verify
from roundexport.errors import CheckpointError, UnsupportedError, UsageError
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.output_head import output_tensor
from roundexport.runtime import AnswerFinder, Classifier, MaskFiller, TokenClassifier, load

BERT = {**ENCODER, "num_hidden_layers": 1, "type_vocab_size": 2}
ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1}
DISTIL = {"vocab_size": 384, "dim": 64, "hidden_dim": 128, "n_layers": 1, "n_heads": 4, "pad_token_id": 1}
DECODER = {**SMALL, "num_hidden_layers": 1}
MODERN = {**FAMILIES["modernbert"][2], "num_hidden_layers": 1}
# name -> (family's prefix in transformers, head, config values)
HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("Bert", "SequenceClassification", {**BERT, "num_labels": 3}),
    "reranker": ("XLMRoberta", "SequenceClassification", {**BERT, **ROBERTA, "num_labels": 1}),
    "distil": ("DistilBert", "SequenceClassification", {**DISTIL, "num_labels": 3}),
    "electra": ("Electra", "SequenceClassification", {**BERT, "embedding_size": 64, "num_labels": 3}),
    "modern": ("ModernBert", "SequenceClassification", {**MODERN, "classifier_pooling": "mean", "num_labels": 3}),
    "qwen": ("Qwen3", "SequenceClassification", {**DECODER, "head_dim": 32, "num_labels": 1}),
    "llama": ("Llama", "SequenceClassification", {**DECODER, "num_labels": 3}),
    "tags": ("Bert", "TokenClassification", {**BERT, "num_labels": 5}),
    "words": ("Bert", "MaskedLM", BERT),
    "untied": ("Roberta", "MaskedLM", {**BERT, **ROBERTA, "tie_word_embeddings": False}),
    "answers": ("Roberta", "QuestionAnswering", {**BERT, **ROBERTA}),
    "words distil": ("DistilBert", "MaskedLM", DISTIL),
}  # fmt: skip
ON_BOTH = ("bert",)  # the others take turns
RUNS = [(name, target) for number, name in enumerate(HEADS) for place, target in enumerate(("onnx", "openvino"))
        if name in ON_BOTH or number % 2 != place]  # fmt: skip


@pytest.fixture(scope="session")
def headed(shared: Callable[[str, Callable[[Path], object]], Path]) -> Callable[[str], Path]:
    """``headed("bert")`` is a tiny random model with a head, made once a session."""

    def make(name: str, folder: Path) -> None:
        import transformers

        family, head, values = HEADS[name]
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**values)
        model = getattr(transformers, f"{family}For{head}")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.3) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        _tokenizer(folder)

    return lambda name: shared(f"head-{name}", lambda folder: make(name, folder))


@pytest.fixture(scope="session")
def packaged(
    headed: Callable[[str], Path], shared: Callable[[str, Callable[[Path], object]], Path]
) -> Callable[[str, str], Path]:
    """``packaged("bert", "onnx")``: the float package, made once a session."""

    def get(name: str, target: str) -> Path:
        return shared(f"head-{name}-{target}", lambda out: export(headed(name), out, to=target, progress=False))

    return get


@pytest.mark.parametrize(("name", "target"), RUNS)
def test_logits_are_those_of_transformers(
    name: str, target: str, headed: Callable[[str], Path], packaged: Callable[[str, str], Path]
) -> None:
    model = Checkpoint.open(headed(name)).load_model()
    package = load(packaged(name, target), precise=True)
    ids, mask = np.random.default_rng(0).integers(4, 384, (3, 12)), np.ones((3, 12), np.int64)
    mask[1, 8:], mask[2, 5:] = 0, 0
    feed = {"input_ids": np.where(mask, ids, 1), "attention_mask": mask}
    found = package.output({**feed, "token_type_ids": np.zeros_like(ids)})
    with torch.no_grad():
        expected = model(**{key: torch.from_numpy(values) for key, values in feed.items()})
        expected = output_tensor(expected).numpy()
    assert found.shape == expected.shape and expected.std() > 0.3
    apart = np.abs(found - expected)
    assert (apart if apart.ndim == 2 else apart[mask == 1]).max() < 1e-4


def test_scores_are_those_of_transformers_pipelines(
    headed: Callable[[str], Path], packaged: Callable[[str, str], Path]
) -> None:
    from transformers import AutoTokenizer, pipeline

    texts = ["The sea was calm.", "Night"]

    def piped(task: str, name: str, **options: Any) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(headed(name))
        return pipeline(task, model=str(headed(name)), tokenizer=tokenizer, device="cpu", **options)

    package = load(packaged("bert", "onnx"), precise=True)
    assert isinstance(package, Classifier) and package.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    for found, wanted in zip(package.classify(texts), piped("text-classification", "bert")(texts), strict=True):
        assert found.label == wanted["label"] and abs(found.score - wanted["score"]) < 1e-5
        assert abs(sum(found.scores.values()) - 1) < 1e-6
    tagger = load(packaged("tags", "openvino"), precise=True)
    assert isinstance(tagger, TokenClassifier)
    for row, wanted in zip(tagger.classify(texts), piped("token-classification", "tags")(texts), strict=True):
        assert [(one.start, one.end, one.label) for one in row] == [
            (one["start"], one["end"], one["entity"]) for one in wanted
        ]


def test_relevance_is_that_of_a_cross_encoder(
    headed: Callable[[str], Path], packaged: Callable[[str, str], Path]
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    documents = ["An old man stood on the shore.", "Boats", "Night fell upon the sea, and nobody came." * 9]
    wanted = sentence_transformers.CrossEncoder(str(headed("reranker")), device="cpu").predict(
        [("the sea", document) for document in documents]
    )
    package = load(packaged("reranker", "onnx"), precise=True)
    assert isinstance(package, Classifier)
    assert np.abs(package.score("the sea", documents, batch_size=2) - wanted).max() < 1e-5
    several = load(packaged("bert", "onnx"))
    assert isinstance(several, Classifier)
    with pytest.raises(UnsupportedError, match="one label; this one has 3"):
        several.score("the sea", documents)


def test_words_for_a_mask(packaged: Callable[[str, str], Path]) -> None:
    package = load(packaged("words", "onnx"))
    assert isinstance(package, MaskFiller)
    with pytest.raises(UnsupportedError, match="names no mask token"):
        package.fill(["the sea"])
    package.tokenizer._special["mask_token"] = "<sep>"
    ((filled, _),) = package.fill(["the <sep> sea <sep>"], top=3)
    logits = package.logits(package.padded(*package.rows_of(["the <sep> sea <sep>"])))[0]
    place = package.tokenizer.encode("the <sep> sea <sep>").index(3)
    assert [one.token for one in filled] == np.argsort(-logits[place])[:3].tolist()
    assert 1 > filled[0].score > filled[1].score > 0


@pytest.mark.parametrize(("name", "target"), [("bert", "openvino"), ("words", "onnx"), ("answers", "onnx")])
def test_tuned_and_verified(name: str, target: str, headed: Callable[[str], Path], tmp_path: Path) -> None:
    artifact = tuned(headed(name), tmp_path / "artifact", algorithm="rtn", bits=4, group_size=32)
    export(artifact, tmp_path / "package", to=target, progress=False)
    report = verify(tmp_path / "package", against=headed(name), artifact=artifact, num_samples=8, min_top1=1.0,
                    progress=False)  # fmt: skip
    quality: Any = report.quality
    assert report.integers_checked and 0 < quality.kl.mean < 3 and 0.2 < quality.agreement.mean <= 1
    assert 0.01 < quality.logit_error.mean < 1
    assert bool(report.failures) == (quality.agreement.mean < 1)


def test_a_finisher_trains_a_classifier(headed: Callable[[str], Path], tmp_path: Path) -> None:
    settings = {"num_samples": 2, "sample_len": 16, "steps": 2, "bits": 4, "group_size": 32}
    tuned(headed("bert"), tmp_path / "artifact", algorithm="rtn", finish="end_to_end", **settings)
    assert (tmp_path / "artifact" / "manifest.json").is_file()


def test_heads_without_their_weights_are_refused(headed: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for missing in ("classifier.weight", "bert.pooler.dense.weight"):
        folder = tmp_path / missing
        folder.mkdir()
        (folder / "config.json").write_bytes((headed("bert") / "config.json").read_bytes())
        kept = {k: v for k, v in load_file(headed("bert") / "model.safetensors").items() if k != missing}
        save_file(kept, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=missing):
            tuned(folder, tmp_path / "artifact", algorithm="rtn")


def test_an_answer_is_the_likeliest_stretch_of_all_windows(
    headed: Callable[[str], Path], packaged: Callable[[str, str], Path]
) -> None:
    from transformers import AutoTokenizer

    question, text = "Who stood there?", "An old man stood on the shore, and boats went out. " * 3
    target = next(target for name, target in RUNS if name == "answers")
    package = load(packaged("answers", target), precise=True)
    assert isinstance(package, AnswerFinder)
    model, tokenizer = Checkpoint.open(headed("answers")).load_model(), AutoTokenizer.from_pretrained(headed("answers"))
    question_tokens = len(tokenizer(question, "").input_ids)
    for room, stride in ((400, 128), (40, 20)):  # at once, and in windows as transformers cuts them
        package.max_length = question_tokens + room
        cut = tokenizer(
            question, text, max_length=package.max_length, stride=stride, truncation="only_second",
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        best: dict[tuple[int, int], float] = {}
        for row, ids in enumerate(cut.input_ids):
            with torch.no_grad():
                logits = output_tensor(model(input_ids=torch.tensor([ids])))[0]
            taken = [0, *(place for place, part in enumerate(cut.sequence_ids(row)) if part == 1)]
            p, q = logits[taken].double().softmax(0).T.tolist()
            places = [(0, 0), *(cut.offset_mapping[row][place] for place in taken[1:])]
            best[0, 0] = max(best.get((0, 0), 0.0), p[0] * q[0])
            for i in range(1, len(taken)):
                for j in range(i, min(i + 5, len(taken))):
                    where = places[i][0], places[j][1]
                    best[where] = max(best.get(where, 0.0), p[i] * q[j])
        assert len(cut.input_ids) == 1 if room == 400 else len(cut.input_ids) > 2
        wanted = sorted(best, key=lambda where: -best[where])[:4]
        found = package.answers(question, text, top=4, longest=5, batch_size=3)
        assert [(one.start, one.end) for one in found] == wanted
        assert all(one.text == text[one.start : one.end] for one in found)
        assert np.allclose([one.score for one in found], [best[where] for where in wanted], rtol=1e-3)
    with pytest.raises(UsageError, match="leaves no room"):
        package.max_length = 4
        package.answers(question, text)
