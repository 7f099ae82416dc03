"""The description at ``/openapi.json`` (OpenAPI 3.1): bodies from the very types that decode them, answers as told.

What bodies may hold beyond their types (lengths, ranges) is the server's settings, and is said in the texts.
"""

from __future__ import annotations

from typing import Any

import msgspec

from .audio import FORMATS
from .models import Models
from .multipart import KIND as FORM
from .requests import ChatBody, CompletionBody, EmbeddingBody, RerankBody
from .settings import ServerSettings

_REF = "#/components/schemas/{name}"
_PROBLEMS = {
    "400": "the body asks for what it may not, or is not JSON",
    "401": "no valid key",
    "403": "called by a name or from a page that is refused",
    "404": "no such model",
    "408": "the body did not come in time",
    "413": "the body is too large",
    "415": "the body does not say that it is JSON, or a form where one is asked for",
    "429": "too many requests are waiting; Retry-After says when to come again",
    "500": "the server failed",
    "503": "the server is stopping, an engine of it has stopped, or memory is short",
    "504": "the request took longer than it may",
}
_OBJECT = {"type": "object"}
_EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}


def document(settings: ServerSettings, models: Models) -> dict[str, Any]:
    """The description as JSON.

    Args:
        settings: whether a key is asked for.
        models: for examples.
    """
    bodies = (ChatBody, CompletionBody, EmbeddingBody, RerankBody)
    (chat, completion, embedding, ranking), schemas = msgspec.json.schema_components(bodies, ref_template=_REF)
    paths: dict[str, Any] = {
        "/v1/chat/completions": _post("Answer a chat.", chat, streams=True),
        "/v1/completions": _post("Go on from prompts.", completion, streams=True),
        "/v1/embeddings": _post("Give vectors of texts.", embedding),
        "/v1/rerank": _post("Say how relevant documents are to a query.", ranking),
        "/v1/audio/transcriptions": _post("Write down what is said.", _FORM, kind=FORM),
        "/v1/audio/translations": _post("Write down in English what is said.", _INTO_ENGLISH, kind=FORM),
        "/v1/models": _get("List the models."),
        "/v1/models/{name}": _get("Tell about one model.", parameter=[model.name for model in models]),
        "/v1/stats": _get("Tell how busy the models are, and what they have done."),
        "/ready": _get("Tell whether new requests are taken."),
        "/metrics": _get("Figures for Prometheus.", kind="text/plain"),
        "/health": _get("Tell that the process and its engines live.", closed=False),
        "/openapi.json": _get("This description."),
    }
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "roundexport", "version": "1", "description": "Low-bit packages behind OpenAI's interface."},
        "paths": paths,
        "components": {"schemas": {**schemas, "Error": _ERROR}},
    }
    if settings.keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found


_TEXT = {"type": "string"}
_INTO_ENGLISH: dict[str, Any] = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "a WAV file"},
        "model": _TEXT,
        "prompt": _TEXT,
        "response_format": {"type": "string", "enum": list(FORMATS)},
        "temperature": {"type": "number", "const": 0},
    },
    "additionalProperties": False,
}
_FORM: dict[str, Any] = {
    **_INTO_ENGLISH,
    "properties": {
        **_INTO_ENGLISH["properties"],
        "language": _TEXT,
        "timestamp_granularities[]": {"type": "string", "const": "segment"},
        "stream": {"type": "boolean", "const": False},
    },
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _problems(*statuses: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": _REF.format(name="Error")}}}
    return {status: {"description": _PROBLEMS[status], "content": content} for status in statuses}


def _post(about: str, body: dict[str, Any], streams: bool = False, kind: str = "application/json") -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _OBJECT}}
    if streams:
        content["text/event-stream"] = {"schema": _EVENT}
    if kind == FORM:
        content["text/plain"] = {"schema": _TEXT}
    return {
        "post": {
            "summary": about,
            "requestBody": {"required": True, "content": {kind: {"schema": body}}},
            "responses": {"200": {"description": "done", "content": content}, **_problems(*_PROBLEMS)},
        }
    }


def _get(
    about: str, kind: str = "application/json", closed: bool = True, parameter: list[str] | None = None
) -> dict[str, Any]:
    problems = ("401", "403", "404", "500", "503") if closed else ("403", "500", "503")
    schema = _OBJECT if kind == "application/json" else {"type": "string"}
    found: dict[str, Any] = {
        "summary": about,
        "responses": {"200": {"description": "done", "content": {kind: {"schema": schema}}}, **_problems(*problems)},
    }
    if parameter is not None:
        found["parameters"] = [
            {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}, "examples": {
                name: {"value": name} for name in parameter}}
        ]  # fmt: skip
    if not closed:
        found["security"] = []
    return {"get": found}
