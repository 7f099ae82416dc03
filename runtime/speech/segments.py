"""What a model wrote with times, as pieces of speech, and how far the window moves on.

    <|0.00|> words <|4.20|> <|4.20|> words <|7.00|>              two pieces, nobody speaks after 7.00: a whole window on
    <|0.00|> words <|4.20|> <|4.20|> words that are cut off      one piece; the next window begins at 4.20
    <|0.00|> words <|4.20|>                                      one piece, to 4.20
    <|0.00|> words that do not end                               one piece, to the window's end

A window that is cut in the middle of a word so does not cut the word: what was not finished is heard again, whole.

Source: transcribe.py of https://github.com/openai/whisper (MIT); transformers' _retrieve_segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Speech between two times.

    Args:
        start: step of its beginning in the window.
        end: step of its end.
        tokens: its tokens, times left out.
    """

    start: int
    end: int
    tokens: tuple[int, ...]


def pieces_of(written: Sequence[int], times: int, steps: int) -> tuple[list[Piece], int]:
    """Pieces of speech of a window, and how many steps the next window begins later.

    Args:
        written: tokens after the prompt, without the end of the transcript.
        times: the token of the time 0.
        steps: length of the window.

    Returns:
        The pieces, and 1 to ``steps``.
    """
    stamped = [token >= times for token in written]
    cuts = [place for place in range(1, len(written)) if stamped[place - 1] and stamped[place]]
    if not cuts:
        ends = [token - times for token in written if token > times]
        return [_piece(written, times, 0, min(ends[-1], steps) if ends else steps)], steps
    whole = len(written) > 1 and stamped[-1] and not stamped[-2]
    if whole:
        cuts.append(len(written))
    found, begin = [], 0
    for cut in cuts:
        part = written[begin:cut]
        found.append(_piece(part, times, part[0] - times, part[-1] - times))
        begin = cut
    reached = written[begin - 1] - times
    return found, steps if whole else max(1, min(reached, steps))


def _piece(written: Sequence[int], times: int, start: int, end: int) -> Piece:
    return Piece(start, end, tuple(token for token in written if token < times))
