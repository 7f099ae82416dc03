"""Pieces of an HTML page: every word that comes from a record is escaped here, once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

from .numbers import Pairs
from .svg import Drawing

_LINE = 21  # characters
NARROW, WIDE = 328.0, 672.0
"""Widths of drawings: a phone's column, and the page's."""


def paragraph(words: str, style: str = "") -> str:
    """A paragraph."""
    styled = f' class="{style}"' if style else ""
    return f"<p{styled}>{escape(words)}</p>"


def pairs(found: Pairs) -> str:
    """What and value, one under the other."""
    return "<dl>" + "".join(f"<dt>{escape(what)}</dt><dd>{escape(value)}</dd>" for what, value in found) + "</dl>"


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = (), *, wraps: bool = True
) -> str:
    """A table; the first column names the row, with a note of it below.

    Args:
        columns: their names.
        rows: a text per column.
        notes: a note per row.
        wraps: rows become lists on a phone; not so where all columns have room there.
    """
    below = iter(notes)
    heads = "".join(f'<th scope="col"{_side(index)}>{escape(name)}</th>' for index, name in enumerate(columns))
    body = "".join(
        "<tr>"
        + f'<th scope="row">{escape(row[0])}{_note(next(below, ""))}</th>'
        + "".join(
            f'<td class="{_kind(value)}" data-name="{escape(name)}"><span>{escape(value)}</span></td>'
            for name, value in zip(columns[1:], row[1:], strict=True)
        )
        + "</tr>"
        for row in rows
    )
    style = ' class="wraps"' if wraps else ""
    return f"<table{style}><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def key(entries: Iterable[tuple[str, str]]) -> str:
    """What colors mean: (class, words)."""
    return '<ul class="key">' + "".join(f'<li><i class="{c}"></i>{escape(w)}</li>' for c, w in entries) + "</ul>"


def both(draw: Callable[[float], Drawing]) -> str:
    """A drawing for a phone and one for a page; one of them is shown."""
    shown = (("narrow", NARROW), ("wide", WIDE))
    return "".join(f'<div class="{style}">{draw(width).svg()}</div>' for style, width in shown)


def tiles(drawings: Iterable[Drawing]) -> str:
    """Small drawings, as many beside each other as fit."""
    return '<div class="tiles">' + "".join(f"<div>{drawing.svg()}</div>" for drawing in drawings) + "</div>"


def halves(entries: Iterable[tuple[str, Drawing]]) -> str:
    """Drawings with titles, two beside each other where there is room."""
    shown = (f"<section><h3>{escape(title)}</h3>{drawing.svg()}</section>" for title, drawing in entries)
    return '<div class="halves">' + "".join(shown) + "</div>"


def section(title: str, *parts: str) -> str:
    """A section; nothing where nothing is in it."""
    inside = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{inside}</section>" if inside else ""


def page(title: str, style: str, *parts: str) -> str:
    """The whole document."""
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{style}</style>'
    )
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _kind(value: str) -> str:
    """A figure stays on one line; a longer text is broken."""
    return "n" if len(value) > _LINE else "n one"


def _note(words: str) -> str:
    return f"<small>{escape(words)}</small>" if words else ""


def _side(index: int) -> str:
    return ' class="n"' if index else ""
