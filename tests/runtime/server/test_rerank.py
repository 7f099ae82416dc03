"""Documents ranked over HTTP, in the form of Cohere and Jina: the package's own scores, the best first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from roundexport.runtime import Classifier, load

if TYPE_CHECKING:
    from server_toys import Running


def test_documents_are_ranked(server: Running, folders: dict[str, Path]) -> None:
    ranker = load(folders["ranker"], threads=1)
    assert isinstance(ranker, Classifier)
    documents = [
        f"a text about {word} " * (1 + place) for place, word in enumerate("ships night men boats".split() * 5)
    ]
    wanted = ranker.score("the sea", documents)
    found = server.post("rerank", {"query": "the sea", "documents": documents}).json()
    order = [one["index"] for one in found["results"]]
    assert order == sorted(range(len(documents)), key=lambda place: -wanted[place])
    np.testing.assert_allclose([one["relevance_score"] for one in found["results"]], wanted[order], atol=1e-6)
    assert found["usage"]["total_tokens"] > 100 and "document" not in found["results"][0]
    objects = {"query": "the sea", "documents": [{"text": text} for text in documents], "model": "ranker"}
    few = server.post("rerank", {**objects, "top_n": 2, "return_documents": True}).json()["results"]
    assert few == [{**one, "document": {"text": documents[one["index"]]}} for one in found["results"][:2]]


def test_documents_are_cut_where_that_is_asked_for(server: Running, folders: dict[str, Path]) -> None:
    ranker = load(folders["ranker"], threads=1)
    assert isinstance(ranker, Classifier)
    text = "the sea " * 700
    found = server.post("rerank", {"query": "boats", "documents": [text, "the"], "max_tokens_per_doc": 3}).json()
    short = ranker.tokenizer.beginning(text, 3)
    assert len(ranker.tokenizer.encode(short)) == 3 and text.startswith(short)
    scores = {one["index"]: one["relevance_score"] for one in found["results"]}
    np.testing.assert_allclose([scores[0], scores[1]], ranker.score("boats", [short, "the"]), atol=1e-6)
