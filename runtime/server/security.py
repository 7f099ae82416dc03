"""What every request passes before anything reads it: name of the host, origin, key, type and size of the body.

- *Host*.  A page of a stranger may point its own name at 127.0.0.1 (DNS rebinding) and would then be same-origin with a
  server there.  On a loopback address only names of this machine are therefore answered; elsewhere the key protects.
- *Origin* and *Content-Type*.  A browser sends a stranger's form or plain text anywhere without asking, but says where
  it comes from.  A request that says it comes from another origin is refused, and a body must say that it is JSON,
  which browsers ask about first, or where a sound is sent a form.
- *Key*.  Everything but ``/health`` and the page's own files wants ``Authorization: Bearer KEY`` if there are keys.
  The page's files hold nothing secret and a browser cannot send a key for an address that is typed in; the page asks
  for the key and sends it with its calls.  Keys are compared in constant time, and all of them.
- *Body*.  Read up to a limit, whatever its length is said to be, within a time, and only then handed on.
"""

from __future__ import annotations

import asyncio
import hmac
import os
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from roundexport.errors import UsageError

from .errors import ApiError
from .multipart import KIND as FORM
from .settings import ServerSettings, is_loopback

KEY_VARIABLE = "ROUNDEXPORT_API_KEY"
OPEN = ("/", "/health", "/favicon.ico")  # and what lies below /page/
PAGE = "/page/"
_JSON = "application/json"
BODIES = {  # elsewhere none is read
    "/v1/chat/completions": _JSON,
    "/v1/completions": _JSON,
    "/v1/embeddings": _JSON,
    "/v1/rerank": _JSON,
    "/v1/audio/transcriptions": FORM,
    "/v1/audio/translations": FORM,
}
_SHORTEST_KEY = 8


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Keys from a file, one per line, or else from the environment; none where neither is there.

    Raises:
        UsageError: the file cannot be read or holds no key, or a key is too short to be one.
    """
    if path is None:
        keys = tuple(os.environ.get(KEY_VARIABLE, "").split())
        where = KEY_VARIABLE
    else:
        try:
            keys = tuple(path.read_text(encoding="utf-8").split())
        except (OSError, ValueError) as error:
            raise UsageError(f"the key file cannot be read: {error}") from error
        where = str(path)
        if not keys:
            raise UsageError(f"{path}: no key in it; write one per line")
    if any(len(key) < _SHORTEST_KEY for key in keys):
        raise UsageError(f"{where}: a key has at least {_SHORTEST_KEY} characters")
    return keys


class Guard:
    """ASGI middleware with all of these checks.

    Args:
        app: what is guarded.
        settings: keys, names and limits.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings
        self._keys = [key.encode() for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_names(headers)
            if scope["path"] not in OPEN and not scope["path"].startswith(PAGE):
                self._check_key(headers)
            if scope["method"] == "POST" and scope["path"] in BODIES:
                receive = await self._with_body(headers, receive, BODIES[scope["path"]])
        except ApiError as error:
            await error.response()(scope, receive, send)
        except TimeoutError:
            late = ApiError(408, "the body did not come in time")
            await late.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check_names(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._settings.loopback:
            name = host_name(host)
            if not is_loopback(name) and name not in self._settings.allow_hosts:
                raise ApiError(
                    403, "this server answers to names of this machine alone (127.0.0.1, localhost); "
                    "start it with --allow-host for another", code="host_refused",
                )  # fmt: skip
        origin = headers.get("origin")
        if origin is not None and urlsplit_netloc(origin) != host.lower():
            raise ApiError(403, "requests of pages from elsewhere are refused", code="origin_refused")

    def _check_key(self, headers: Headers) -> None:
        if not self._keys:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        found = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]
        if kind.lower() != "bearer" or not any(found):
            raise ApiError(
                401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip

    async def _with_body(self, headers: Headers, receive: Receive, wanted: str) -> Receive:
        """Read the body, and give it out as one message."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != wanted and wanted == _JSON:
            raise ApiError(415, "send JSON, with the header Content-Type: application/json", code="not_json")
        if kind != wanted:
            raise ApiError(415, f"send a form, with the header Content-Type: {FORM}; boundary=…", code="not_a_form")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "send the body as it is, without Content-Encoding", code="encoded_body")
        limit = self._settings.max_body if wanted == _JSON else self._settings.max_upload
        announced = headers.get("content-length", "0")
        if announced.isascii() and announced.isdigit() and int(announced[:20]) > limit:
            raise _too_large(limit)
        parts, size = [], 0
        async with asyncio.timeout(self._settings.body_s):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the client left before its body had come")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise _too_large(limit)
                more = message.get("more_body", False)
        return _Once(b"".join(parts), receive)


class _Once:
    """Gives a body that was read already, then what else comes."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"a body may have {limit} bytes", code="body_too_large")


def host_name(host: str) -> str:
    """The name in a Host header, without its port, in small letters."""
    name, _, port = host.lower().rpartition(":")
    return name if name and port.isdigit() and (name.endswith("]") or ":" not in name) else host.lower()


def urlsplit_netloc(origin: str) -> str:
    """Name and port of an origin; empty for what is not one."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
