"""Errors as OpenAI tells them, so that its clients raise what their users expect.

    {"error": {"message": "…", "type": "invalid_request_error", "param": "n" | null, "code": "…" | null}}

What a request does wrong is told in full to whoever sent it; what goes wrong in here is told as such and written to the
log, with the place and not the text, which might quote a prompt; ``ROUNDEXPORT_TRACE=1`` adds it.  Messages are cut.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from roundexport.errors import UnsupportedError, UsageError, WontFitError
from roundexport.runtime.scheduler import FullError, StoppedError

LOG = logging.getLogger("roundexport.server")
_LONGEST = 1000  # characters of a message
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_SERVER = 500
_TRACE = "ROUNDEXPORT_TRACE"


class ApiError(Exception):
    """A request that cannot be answered.

    Args:
        status: of HTTP.
        message: what was asked, what holds, what to do.
        param: path of the value at fault in the body.
        code: a word for programs.
        headers: to send along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """OpenAI's ``type``."""
        return _TYPES.get(self.status, "server_error" if self.status >= _SERVER else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's object."""
        message = str(self)
        message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]}…"
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The error as an answer."""
        return Response(msgspec.json.encode(self.body()), self.status, self.headers, "application/json")


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that asks for what it may not."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: BaseException) -> ApiError:
    """Any error as one of ours; what nobody foresaw goes to the log and becomes a plain 500."""
    if isinstance(error, ApiError):
        return error
    found = _foreseen(error)
    if found is None:
        where = "".join(traceback.format_tb(error.__traceback__)[-12:])
        said = f": {error}" if os.environ.get(_TRACE, "0") not in ("", "0") else f" (set {_TRACE}=1 for its text)"
        LOG.error("unexpected %s%s\n%s", type(error).__name__, said, where)
        found = ApiError(500, "the server failed on this request; its log says where", code="internal_error")
    return found


def _foreseen(error: BaseException) -> ApiError | None:
    if isinstance(error, FullError):
        return ApiError(429, str(error), code="queue_full", headers={"retry-after": str(error.retry_after_s)})
    if isinstance(error, UsageError | UnsupportedError | RecursionError):
        deep = isinstance(error, RecursionError)  # of a request's value: nothing else here has an end that is not known
        return refused("a value of this request is nested too deeply" if deep else str(error))
    if isinstance(error, StoppedError | WontFitError | MemoryError):
        return _unable(error)
    if isinstance(error, TimeoutError):
        # Clients of OpenAI repeat requests that ended in 5xx; this one would take as long again.
        return ApiError(
            504, "the request took longer than this server allows; ask for fewer tokens", code="timeout",
            headers={"x-should-retry": "false"},
        )  # fmt: skip
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return None


def _unable(error: BaseException) -> ApiError:
    if isinstance(error, StoppedError):
        return ApiError(503, str(error), code="engine_stopped", headers={"x-should-retry": "false"})
    return ApiError(503, "not enough memory for this request; try a shorter one", code="out_of_memory")
