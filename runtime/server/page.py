"""The page's files, read once from the folder ``page`` beside this file, and headers that keep it to itself.

Nothing is loaded from elsewhere, no script or style stands inside the HTML, no other page may frame it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from .errors import ApiError

FOLDER = Path(__file__).with_name("page")
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".webmanifest": "application/manifest+json",
}


class Page:
    """The files that are there, by name; others cannot be asked for.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        self._files = {
            path.name: (path.read_bytes(), _TYPES[path.suffix])
            for path in found
            if path.is_file() and path.suffix in _TYPES and not path.name.startswith(".")
        }

    @property
    def names(self) -> list[str]:
        """Files that there are."""
        return list(self._files)

    async def index(self, request: Request) -> Response:
        """The page itself."""
        return self.answer("index.html", request)

    async def file(self, request: Request) -> Response:
        """One of its files."""
        return self.answer(request.path_params["name"], request)

    async def icon(self, request: Request) -> Response:
        """The icon that browsers ask for by themselves."""
        return self.answer("favicon.ico" if "favicon.ico" in self._files else "icon.svg", request)

    def answer(self, name: str, request: Request) -> Response:
        """A file, or word that the client's copy is good.

        Raises:
            ApiError: 404.
        """
        if name not in self._files:
            raise ApiError(404, "the page has no such file", code="not_found")
        data, kind = self._files[name]
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={**HEADERS, "etag": tag})
        return Response(data, headers={**HEADERS, "etag": tag}, media_type=kind)
