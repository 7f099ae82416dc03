"""The application: which path leads where, and what surrounds every endpoint."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from roundexport.runtime.scheduler import StoppedError

from .audio import transcriptions, translations
from .chat import chat
from .completions import completions
from .embeddings import embeddings
from .errors import ApiError, as_api_error
from .in_flight import InFlight
from .metrics import CONTENT_TYPE, Metrics
from .models import DecoderModel, Model, Models
from .openapi import document
from .page import Page
from .rerank import rerank
from .security import Guard
from .service import GONE, Service, as_json, now, service_of
from .settings import ServerSettings
from .sse import ClientGone

Endpoint = Callable[[Request], Awaitable[Response]]


def build(models: Models, settings: ServerSettings) -> Starlette:
    """The ASGI application; it closes the packages when it ends.

    Args:
        models: the opened packages.
        settings: limits and keys.
    """
    service = Service(models, settings, Metrics(models))
    page, described, began = Page(), document(settings, models), now()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            models.close()

    async def list_models(request: Request) -> Response:
        return as_json({"object": "list", "data": [_listed(model, began) for model in models]})

    async def one_model(request: Request) -> Response:
        model = models.named(request.path_params["name"])
        return as_json({**_listed(model, began), "card": model.card})

    async def openapi(request: Request) -> Response:
        return as_json(described)

    routes = [
        _route("/v1/chat/completions", chat, "POST"),
        _route("/v1/completions", completions, "POST"),
        _route("/v1/embeddings", embeddings, "POST"),
        _route("/v1/rerank", rerank, "POST"),
        _route("/v1/audio/transcriptions", transcriptions, "POST"),
        _route("/v1/audio/translations", translations, "POST"),
        _route("/v1/models", list_models),
        _route("/v1/models/{name}", one_model),
        _route("/v1/stats", stats),
        _route("/health", health),
        _route("/ready", ready),
        _route("/metrics", metrics),
        _route("/openapi.json", openapi),
        _route("/", page.index),
        _route("/favicon.ico", page.icon),
        _route("/page/{name}", page.file),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[
            Middleware(InFlight, service=service),
            Middleware(Guard, settings=_with_pictures(settings, models)),
        ],
        exception_handlers={HTTPException: _nowhere},
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


def _with_pictures(settings: ServerSettings, models: Models) -> ServerSettings:
    """Limits of bodies that may hold pictures, where a package reads them."""
    if not any(isinstance(model, DecoderModel) and model.decoder.sees for model in models):
        return settings
    return replace(settings, max_body=settings.max_body + settings.max_pictures * settings.picture_body)


async def health(request: Request) -> Response:
    """The process lives, and with it every engine: one that has stopped comes back with a new process alone."""
    _check_engines(request)
    return as_json({"status": "ok"})


async def ready(request: Request) -> Response:
    """Whether new requests are taken."""
    if service_of(request).draining:
        raise ApiError(503, "the server is stopping", code="stopping")
    _check_engines(request)
    return as_json({"status": "ready"})


def _check_engines(request: Request) -> None:
    if not all(model.alive for model in service_of(request).models):
        raise StoppedError


async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE)


async def stats(request: Request) -> Response:
    """How busy every package is, and what it has done."""
    found: dict[str, Any] = {}
    for model in service_of(request).models:
        if isinstance(model, DecoderModel):
            found[model.name] = {"load": asdict(model.scheduler.load), "counts": asdict(model.scheduler.counts)}
        else:
            found[model.name] = {"load": {"waiting": 0, "writing": model.busy()}}
    return as_json({"object": "stats", "models": found})


def _listed(model: Model, began: int) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": began,
        "owned_by": "roundexport",
        "task": model.task,
        "target": model.card["target"],
        "max_context": model.max_context,
    }


def _route(path: str, endpoint: Endpoint, method: str = "GET") -> Route:
    async def answered(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ClientGone:
            return Response(status_code=GONE)
        except Exception as error:
            return as_api_error(error).response()

    return Route(path, answered, methods=[method])


async def _nowhere(request: Request, error: Exception) -> Response:
    found = as_api_error(error)
    if found.status == 404:
        found = ApiError(404, "there is nothing here; /openapi.json lists what there is", code="not_found")
    elif found.status == 405:
        allowed = ", ".join(sorted(found.headers.get("Allow", "another method").split(", ")))
        found = ApiError(405, f"use {allowed} here", code="method_not_allowed", headers={"allow": allowed})
    return found.response()
