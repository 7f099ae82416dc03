"""The verb `classify`: what a package with a head says of texts: labels, relevance to a query, or words for a mask.

Of a package of images the arguments are picture files.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from roundexport.errors import UnsupportedError, UsageError

from . import printing
from .shared_options import Engine, Json, Properties, RuntimeDevice, Threads, named_values


def classify(  # noqa: PLR0913, PLR0917
    package: Path,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT…", help="Texts, each in quotes; or pictures.")],
    query: Annotated[
        str | None,
        typer.Option(help="Rank the texts by how relevant they are to this query, or answer it from each of them."),
    ] = None,
    top: Annotated[int, typer.Option(help="Labels, or words for a mask, to show of each text.")] = 3,
    engine: Engine = "auto",
    device: RuntimeDevice = "CPU",
    threads: Threads = None,
    properties: Properties = None,
    json: Json = False,
) -> None:
    """Label texts, tokens or pictures, rank texts by a query, answer it, or fill masks, by the package's head."""
    from roundexport.runtime import AnswerFinder, Classifier, ImageClassifier, MaskFiller, TokenClassifier, load

    told = named_values(properties, "--property")
    opened = load(package, engine=engine, device=device, threads=threads, properties=told)
    if query is not None and not isinstance(opened, Classifier | AnswerFinder):
        raise UsageError(f"{package}: --query goes with packages that classify texts or answer questions, this one's "
                         f"task is {opened.manifest.task}")  # fmt: skip
    found: list[Any]
    if isinstance(opened, Classifier) and query is not None and len(opened.labels) == 1:
        scores = opened.score(query, texts).tolist()
        order = sorted(range(len(texts)), key=lambda place: -scores[place])
        found = [{"index": place, "relevance_score": scores[place], "text": texts[place]} for place in order]
        lines = [f"{one['relevance_score']:.4f}  {one['text']}" for one in found]
    elif isinstance(opened, Classifier):
        given = texts if query is None else [(query, text) for text in texts]
        labels = opened.classify(given)
        found = [{"text": text, **asdict(one)} for text, one in zip(texts, labels, strict=True)]
        lines = [f"{_best(one.scores, top)}  {text}" for text, one in zip(texts, labels, strict=True)]
    elif isinstance(opened, ImageClassifier):
        labels = opened.classify(texts)
        found = [{"picture": path, **asdict(one)} for path, one in zip(texts, labels, strict=True)]
        lines = [f"{_best(one.scores, top)}  {path}" for path, one in zip(texts, labels, strict=True)]
    elif isinstance(opened, TokenClassifier):
        tokens = opened.classify(texts)
        found = [{"text": text, "tokens": [asdict(t) for t in row]} for text, row in zip(texts, tokens, strict=True)]
        lines = [f"{t.start}-{t.end}  {t.label} {t.score:.4f}  {t.text}" for row in tokens for t in row]
    elif isinstance(opened, AnswerFinder):
        if query is None:
            raise UsageError(f"{package} answers questions; ask one with --query")
        answers = [opened.answers(query, text, top) for text in texts]
        found = [{"text": text, "answers": [asdict(a) for a in row]} for text, row in zip(texts, answers, strict=True)]
        lines = [f"{a.start}-{a.end}  {a.score:.4f}  {a.text or '(not in the text)'}" for row in answers for a in row]
    elif isinstance(opened, MaskFiller):
        filled = opened.fill(texts, top)
        found = [
            {"text": text, "masks": [[asdict(one) for one in mask] for mask in row]}
            for text, row in zip(texts, filled, strict=True)
        ]
        lines = [", ".join(f"{o.text.strip()} {o.score:.4f}" for o in mask) for row in filled for mask in row]
    else:
        raise UnsupportedError(f"{package} has no head; its task is {opened.manifest.task}")
    if json:
        printing.document(found)
    for line in () if json else lines:
        printing.line(line)


def _best(scores: dict[str, float], top: int) -> str:
    """The likeliest labels with their scores."""
    order = sorted(scores, key=lambda label: -scores[label])[:top]
    return ", ".join(f"{label} {scores[label]:.4f}" for label in order)
