"""``/v1/embeddings``: texts or token ids in, vectors out, as numbers or as base64 of little-endian float32.

A text longer than the model reads is refused, as OpenAI does; cutting it silently would give the vector of another
text.  The model's default prompt, if it has one, is put in front of texts; ``prompt_name`` (an extension) names
another.  Token ids are taken as they are.  Vectors have the length that the package gives: ``dimensions`` is refused
unless it says just that.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from roundexport.runtime.types import Floats

from .answers import check_bytes
from .errors import refused
from .models import EncoderModel
from .requests import EmbeddingBody, decode, rows
from .service import as_json, service_of, watched
from .settings import ServerSettings
from .sse import while_connected

TOKENS = 2**20
"""Of one request."""


async def embeddings(request: Request) -> Response:
    """Give vectors of texts."""
    service = service_of(request)
    body = decode(await request.body(), EmbeddingBody)
    model = service.models.encoder(body.model)
    seen = service.metrics.begin("embeddings", model.name)
    async with watched(seen):
        check(body, model, service.settings)
        async with asyncio.timeout_at(service.deadline(request)):
            vectors, tokens = await while_connected(request.receive, _embed(model, body))
            data = await asyncio.to_thread(_data, vectors, body.encoding_format == "base64")
        seen.end("", tokens)
    used = {"prompt_tokens": tokens, "total_tokens": tokens}
    return as_json({"object": "list", "data": data, "model": model.name, "usage": used})


def check(body: EmbeddingBody, model: EncoderModel, limits: ServerSettings) -> None:
    """Refuse what is not here and what is too much.

    Raises:
        ApiError: says what.
    """
    width = model.encoder.width
    if body.dimensions is not None and body.dimensions != width:
        raise refused(f"the model {model.name!r} gives {width} dimensions; leave dimensions out", "dimensions")
    given = rows(body.input, "input")
    if len(given) > limits.max_texts:
        raise refused(f"one request may have {limits.max_texts} texts, not {len(given)}", "input")


async def _embed(model: EncoderModel, body: EmbeddingBody) -> tuple[list[Floats], int]:
    ids, types = await asyncio.to_thread(encode, model, rows(body.input, "input"), body.prompt_name)
    total = sum(map(len, ids))
    if total > TOKENS:
        raise refused(f"one request may have {TOKENS} tokens, not {total}", "input")
    return await model.embed(ids, types), total


def encode(
    model: EncoderModel, given: list[str] | list[list[int]], prompt_name: str | None
) -> tuple[list[list[int]], list[list[int]] | None]:
    """Token ids and type ids of texts; for a worker thread.

    Raises:
        ApiError: a text is empty or longer than the model reads, or an id is not in the vocabulary.
        UsageError: the model has no prompt of that name.
    """
    front = model.encoder.prompts.choose(None, prompt_name)
    texts = [text for text in given if isinstance(text, str)]
    for text in texts:
        check_bytes(len(text), model.longest, model.max_context)
    texts = [front + text for text in texts]
    if texts:
        found = model.tokenizer.encode_batch(texts)
        ids, types = [one.ids for one in found], [one.type_ids for one in found]
    else:
        ids, types = [list(row) for row in given if not isinstance(row, str)], None
    size = model.encoder.manifest.vocab_size
    for number, row in enumerate(ids):
        if not row or not 0 <= min(row) <= max(row) < size:
            raise refused(f"input {number + 1} has no tokens, or some outside 0 … {size - 1}", "input")
        if len(row) > model.max_context:
            raise refused(
                f"This model's maximum context length is {model.max_context} tokens; input {number + 1} has {len(row)}",
                "input",
                "context_length_exceeded",
            )
    return ids, types


def _data(vectors: list[Floats], base64_wanted: bool) -> list[dict[str, Any]]:
    return [
        {"object": "embedding", "index": index, "embedding": _in_base64(v) if base64_wanted else v.tolist()}
        for index, v in enumerate(vectors)
    ]


def _in_base64(vector: Floats) -> str:
    return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode()
