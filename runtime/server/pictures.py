"""Pictures of a chat: out of the request, never from elsewhere; for a worker thread.

    {"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}

Addresses are refused: a server that fetches what a stranger names can be made to fetch from inside its own network.
A picture says how large it is before it is decoded, and is refused beyond `MOST_PIXELS`.
"""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

from roundexport.errors import UsageError

from .errors import refused
from .models import DecoderModel
from .requests import ContentPart

MOST_PIXELS = 64 << 20


def picture_part(model: DecoderModel, part: ContentPart, where: str) -> dict[str, Any]:
    """The part of a message that stands for a picture, which is read.

    Raises:
        ApiError: it is not in the request, cannot be read, or is too large.
    """
    url = "" if part.image_url is None else part.image_url.url
    head, comma, data = url.partition(",")
    if not (comma and head.lower().startswith("data:image/") and head.lower().endswith(";base64")):
        raise refused(
            f"{where}: a picture's url must be data:image/…;base64,… and hold the picture; nothing is fetched from "
            f"addresses, and this one begins {url[:24]!r}",
            where,
        )
    try:
        image = _opened(base64.b64decode(data, validate=True))
        found: dict[str, Any] = model.decoder.see([image])[0]
    except (binascii.Error, ValueError) as error:
        raise refused(f"{where}: the picture is not base64: {error}", where) from None
    except UsageError as error:
        raise refused(f"{where}: {error}", where) from error
    return found


def _opened(data: bytes) -> Any:
    """A Pillow image, not yet decoded.

    Raises:
        UsageError: it cannot be read, is too large, or Pillow is not installed.
    """
    from roundexport.runtime.images import pillow

    module = pillow()
    try:
        image = module.open(io.BytesIO(data))
    except (OSError, ValueError, SyntaxError, module.DecompressionBombError) as error:
        raise UsageError(f"the picture cannot be read: {str(error)[:100]}") from error
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise UsageError(f"a picture of {width} × {height} pixels is too large; at most {MOST_PIXELS} are read")
    return image
