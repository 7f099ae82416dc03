"""``/v1/audio/transcriptions`` and ``/v1/audio/translations``: a WAV file in, what is said in it out, as OpenAI does.

    file, model, language, prompt, response_format, temperature, timestamp_granularities[]      a form (multipart.py)
    json          {"text", "usage": {"type": "duration", "seconds"}}
    verbose_json  … and "task", "language", "duration", "segments": [{"id", "start", "end", "text", …}]
    text, srt, vtt

Translations are into English and take no language.  The likeliest token is taken, so a temperature above 0 is refused,
as are times of single words, streams and formats other than WAV.
"""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from roundexport.runtime.speech.results import SpeechSettings, Transcript
from roundexport.runtime.speech.subtitles import srt, vtt

from .errors import refused
from .multipart import Part, parts_of
from .service import as_json, service_of, watched
from .sse import while_connected

FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
_GRANULARITIES = "timestamp_granularities[]"
_FIELDS = {"file", "model", "language", "prompt", "response_format", "temperature", _GRANULARITIES, "stream"}


async def transcriptions(request: Request) -> Response:
    """Write down what is said, in its own language."""
    return await _answer(request, "transcribe")


async def translations(request: Request) -> Response:
    """Write down in English what is said."""
    return await _answer(request, "translate")


async def _answer(request: Request, task: str) -> Response:
    service = service_of(request)
    form = _form(parts_of(request.headers.get("content-type", ""), await request.body()), task)
    model = service.models.speech(_text(form, "model"))
    seen = service.metrics.begin("transcription", model.name)
    async with watched(seen):
        file, kind, settings = _sound(form), _format(form), _settings(form, task)
        work = model.transcribe(file.data, file.file or "file", settings, service.settings.max_sound_s)
        async with asyncio.timeout_at(service.deadline(request)):
            found = await while_connected(request.receive, work)
        seen.end("", 0, sum(len(piece.tokens) for piece in found.segments))
    return _told(found, kind, task)


def _form(parts: list[Part], task: str) -> dict[str, Part]:
    """The form by name."""
    known = _FIELDS if task == "transcribe" else _FIELDS - {"language", _GRANULARITIES, "stream"}
    found: dict[str, Part] = {}
    for part in parts:
        if part.name not in known:
            raise refused(f"unrecognized request argument: {part.name[:100]}", part.name[:100], "unknown_parameter")
        if part.name in found:
            raise refused(f"{part.name} comes twice", part.name)
        found[part.name] = part
    return found


def _text(form: dict[str, Part], name: str) -> str | None:
    """A field's text; None where there is none."""
    return form[name].text() or None if name in form else None


def _sound(form: dict[str, Part]) -> Part:
    file = form.get("file")
    if file is None or file.file is None:
        raise refused("send a WAV file as the part file, with its name", "file", "missing_file")
    return file


def _format(form: dict[str, Part]) -> str:
    kind = _text(form, "response_format") or "json"
    if kind not in FORMATS:
        raise refused(f"response_format is one of {', '.join(FORMATS)}, not {kind[:100]!r}", "response_format")
    return kind


def _settings(form: dict[str, Part], task: str) -> SpeechSettings:
    """What is asked of the transcript.

    Raises:
        ApiError: something that is not done here.
    """
    if (_text(form, _GRANULARITIES) or "segment") != "segment":
        raise refused("times are those of segments; timestamp_granularities[] may be segment", _GRANULARITIES)
    if (_text(form, "stream") or "false").lower() != "false":
        raise refused("transcripts do not stream here; leave stream out", "stream")
    given = _text(form, "temperature") or "0"
    try:
        warm = float(given) != 0
    except ValueError:
        raise refused(f"temperature must be a number, not {given[:100]!r}", "temperature") from None
    if warm:
        raise refused("the likeliest token is taken here; leave temperature out, or 0", "temperature")
    timed = _format(form) in ("srt", "vtt", "verbose_json")
    return SpeechSettings(_text(form, "language"), task, timed, _text(form, "prompt"))


def _told(found: Transcript, kind: str, task: str) -> Response:
    if kind == "text":
        return PlainTextResponse(f"{found.text}\n")
    if kind in ("srt", "vtt"):
        return PlainTextResponse((srt if kind == "srt" else vtt)(found.segments))
    used = {"type": "duration", "seconds": round(found.seconds)}
    if kind == "json":
        return as_json({"text": found.text, "usage": used})
    segments = [_segment(number, found) for number in range(len(found.segments))]
    told = {"task": task, "language": found.language, "duration": found.seconds, "text": found.text}
    return as_json({**told, "segments": segments, "usage": used})


def _segment(number: int, found: Transcript) -> dict[str, Any]:
    piece = found.segments[number]
    text = piece.text.encode("utf-8")
    return {
        "id": number,
        "seek": round(piece.window * 100),
        "start": round(piece.start, 3),
        "end": round(piece.end, 3),
        "text": piece.text,
        "tokens": list(piece.tokens),
        "temperature": 0.0,
        "avg_logprob": piece.avg_logprob,
        "compression_ratio": len(text) / len(zlib.compress(text)),
        "no_speech_prob": piece.no_speech_prob,
    }
