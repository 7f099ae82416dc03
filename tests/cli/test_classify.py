"""The verb `classify`: labels, documents by relevance, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import runtime_toys as toys
from cli_tools import Run


def test_documents_by_relevance_and_labels(run: Run, tmp_path: Path) -> None:
    package = toys.onnx_ranker(tmp_path / "ranker")
    documents = ["the boats", "a calm sea", "night"]
    code, out, err = run("classify", package, *documents, "--query", "the sea", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [documents[one["index"]] for one in found] == [one["text"] for one in found]
    scores = [one["relevance_score"] for one in found]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 3
    code, out, err = run("classify", package, *documents)
    assert code == 0 and len(out.splitlines()) == 3 and out.startswith("RELEVANT 0."), err


def test_packages_without_such_a_head_are_refused(run: Run, tmp_path: Path) -> None:
    package = toys.onnx_encoder(tmp_path / "encoder")
    code, _, err = run("classify", package, "a text")
    assert code == 1 and "has no head; its task is embed" in err
    code, _, err = run("classify", package, "a text", "--query", "b")
    assert code == 2 and "--query goes with packages that classify texts" in err
