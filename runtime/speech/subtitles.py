"""A transcript's pieces as subtitles: SubRip (``.srt``) and WebVTT (``.vtt``).

    1                                        WEBVTT
    00:00:00,000 --> 00:00:04,200
    Words.                                   00:00:00.000 --> 00:00:04.200
                                             Words.
Source: https://www.w3.org/TR/webvtt1.
"""

from __future__ import annotations

from collections.abc import Sequence

from .results import Segment

FORMATS = ("srt", "vtt")


def srt(segments: Sequence[Segment]) -> str:
    """The pieces as SubRip."""
    return "\n".join(
        f"{number}\n{_time(one.start, ',')} --> {_time(one.end, ',')}\n{_words(one)}\n"
        for number, one in enumerate(segments, 1)
    )


def vtt(segments: Sequence[Segment]) -> str:
    """The pieces as WebVTT."""
    cues = [f"{_time(one.start, '.')} --> {_time(one.end, '.')}\n{_words(one)}\n" for one in segments]
    return "\n".join(["WEBVTT\n", *cues])


def _words(segment: Segment) -> str:
    """Words that cannot be taken for the arrow between two times."""
    return segment.text.strip().replace("-->", "->")


def _time(seconds: float, point: str) -> str:
    minutes, thousandths = divmod(round(seconds * 1000), 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{thousandths // 1000:02d}{point}{thousandths % 1000:03d}"
