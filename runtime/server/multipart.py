"""Bodies of ``multipart/form-data``: a form's fields and files, from bytes that are all there.

    --BOUNDARY CRLF  Content-Disposition: form-data; name="file"; filename="a.wav" CRLF  … CRLF CRLF  bytes CRLF
    --BOUNDARY CRLF  Content-Disposition: form-data; name="model" CRLF CRLF  text CRLF
    --BOUNDARY--

The body's size is limited before it comes here (security.py); here the number of parts and the length of their heads
are.  Files in several parts of one name, other encodings and nested forms are refused.

Source: RFC 7578, RFC 2046 section 5.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from email.message import Message

from .errors import ApiError

KIND = "multipart/form-data"
_PARTS = 32
_HEAD = 4096


@dataclass(frozen=True)
class Part:
    """A field or a file of a form.

    Args:
        name: the field's.
        file: the file's name; None for a field.
        data: its bytes.
    """

    name: str
    file: str | None
    data: bytes

    def text(self) -> str:
        """A field's text.

        Raises:
            ApiError: a file, or not UTF-8.
        """
        if self.file is not None:
            raise _broken(f"{self.name} must be a field with text, not a file")
        try:
            return self.data.decode("utf-8")
        except ValueError:
            raise _broken(f"the text of {self.name} is not UTF-8") from None


def parts_of(content_type: str, body: bytes) -> list[Part]:
    """The parts of a form.

    Args:
        content_type: the request's header.
        body: all of the body.

    Raises:
        ApiError: the body is not such a form, is cut off, or has too many parts.
    """
    boundary = _parameter(content_type, "boundary")
    if not boundary or len(boundary) > 70 or not boundary.isascii():
        raise _broken("the header Content-Type names no boundary of at most 70 characters")
    mark = b"\r\n--" + boundary.encode("ascii")
    pieces = (b"\r\n" + body).split(mark, _PARTS + 2)
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise _broken(f"the form is cut off, or has more than {_PARTS} parts")
    return [_part(piece) for piece in pieces[1:-1]]


def _part(piece: bytes) -> Part:
    head, found, data = piece.partition(b"\r\n\r\n")
    if not found or len(head) > _HEAD:
        raise _broken(f"a part has no head of at most {_HEAD} bytes with an empty line behind it")
    lines = head.decode("utf-8", "replace").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    disposition = headers.get("content-disposition", "")
    name = _parameter(disposition, "name")
    if disposition.partition(";")[0].strip().lower() != "form-data" or not name:
        raise _broken("a part does not say Content-Disposition: form-data; name=…")
    if headers.get("content-transfer-encoding", "binary").lower() not in ("binary", "8bit", "7bit"):
        raise _broken(f"{name}: send the part as it is, without Content-Transfer-Encoding")
    return Part(name, _parameter(disposition, "filename"), data)


def _parameter(header: str, name: str) -> str | None:
    """A parameter of a header, quotes taken off."""
    message = Message()
    message["x"] = header.replace("\r", " ").replace("\n", " ")
    found = message.get_param(name, None, "x")
    return found if isinstance(found, str) else None


def _broken(why: str) -> ApiError:
    return ApiError(400, why, code="invalid_form")
