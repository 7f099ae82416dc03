"""``/v1/rerank``: a query and documents in, how relevant each is out, best first; in the form of Cohere and Jina.

    {"model", "query", "documents": ["…" | {"text": "…"}], "top_n", "return_documents", "max_tokens_per_doc"}
    {"results": [{"index", "relevance_score", "document": {"text"}}], "model", "usage": {…}}

Scores are those of sentence-transformers' CrossEncoder for the same model: 0 to 1 where it ends in a sigmoid.  A query
and a document that are longer together than the model reads are refused; ``max_tokens_per_doc`` cuts documents first.
"""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from .answers import check_bytes
from .embeddings import TOKENS
from .errors import refused
from .models import ClassifierModel
from .requests import RerankBody, decode
from .service import as_json, new_id, service_of, watched
from .settings import ServerSettings
from .sse import while_connected

_Rows = tuple[list[list[int]], list[list[int]]]


async def rerank(request: Request) -> Response:
    """Say how relevant documents are to a query."""
    service = service_of(request)
    body = decode(await request.body(), RerankBody)
    model = service.models.reranker(body.model)
    seen = service.metrics.begin("rerank", model.name)
    async with watched(seen):
        documents = [one if isinstance(one, str) else one.text for one in body.documents]
        check(documents, body, service.settings)
        async with asyncio.timeout_at(service.deadline(request)):
            scores, tokens = await while_connected(request.receive, _score(model, body, documents))
        seen.end("", tokens)
    order = sorted(range(len(scores)), key=lambda place: -scores[place])[: body.top_n]
    told = [
        {
            "index": place,
            "relevance_score": scores[place],
            **({"document": {"text": documents[place]}} if body.return_documents else {}),
        }
        for place in order
    ]
    used = {"prompt_tokens": tokens, "total_tokens": tokens}
    return as_json({"id": new_id("rerank"), "object": "list", "model": model.name, "results": told, "usage": used})


def check(documents: list[str], body: RerankBody, limits: ServerSettings) -> None:
    """Refuse what is too much.

    Raises:
        ApiError: says what.
    """
    if len(documents) > limits.max_texts:
        raise refused(f"one request may have {limits.max_texts} documents, not {len(documents)}", "documents")
    empty = next((number for number, text in enumerate(documents, 1) if not text), None)
    if empty is not None:
        raise refused(f"document {empty} is empty", "documents")


async def _score(model: ClassifierModel, body: RerankBody, documents: list[str]) -> tuple[list[float], int]:
    ids, types = await asyncio.to_thread(encode, model, body.query, documents, body.max_tokens_per_doc)
    total = sum(map(len, ids))
    if total > TOKENS:
        raise refused(f"one request may have {TOKENS} tokens, not {total}", "documents")
    return await model.relevance(ids, types), total


def encode(model: ClassifierModel, query: str, documents: list[str], longest: int | None) -> _Rows:
    """Token ids and type ids of the query with each document; for a worker thread.

    Raises:
        ApiError: a pair is longer than the model reads.
    """
    for text in (query, *(documents if longest is None else ())):
        check_bytes(len(text), model.longest, model.max_context)
    if longest is not None:
        documents = [model.tokenizer.beginning(text, longest) for text in documents]
    rows, types = model.package.pairs(query, documents)
    for number, row in enumerate(rows, 1):
        if len(row) > model.max_context:
            raise refused(
                f"This model's maximum context length is {model.max_context} tokens; the query with document {number} "
                f"has {len(row)}; shorten it, or cut documents with max_tokens_per_doc",
                "documents",
                "context_length_exceeded",
            )
    return rows, types
