"""The page's files: nothing from elsewhere, nothing inline, no text ever read as markup, colors that can be read."""

from __future__ import annotations

import re
import tomllib
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from page_stand_in import PAGE

from conftest import ROOT

FILES = {path.name: path.read_text(encoding="utf-8") for path in sorted(PAGE.iterdir())}
SCRIPTS = sorted(name for name in FILES if name.endswith(".js"))
KINDS = (".html", ".css", ".js", ".svg")
LONGEST, WIDEST, LARGEST = 400, 120, 120_000  # lines of a file, characters of a line, characters of all


class Elements(HTMLParser):
    """Every element of a document, and text inside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.inline: list[str] = []
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        if self._tag in {"script", "style"} and data.strip():
            self.inline.append(data)


INDEX = Elements(FILES["index.html"])


def test_the_page_is_there_and_small() -> None:
    assert all(name.endswith(KINDS) for name in FILES)
    assert sum(map(len, FILES.values())) < LARGEST
    assert not {name: text.count("\n") for name, text in FILES.items() if text.count("\n") > LONGEST}
    written = {name: text for name, text in FILES.items() if not name.endswith(".svg")}
    assert not {name: line for name, text in written.items() for line in text.splitlines() if len(line) > WIDEST}


@pytest.mark.parametrize("name", FILES)
def test_nothing_comes_from_elsewhere(name: str) -> None:
    text = FILES[name].replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.findall(r"""https?:|\bwss?:|["'(]//|@import""", text)


def test_it_is_installed_with_the_server() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = config["package-data"]["roundexport.runtime.server"]
    folder = ROOT / config["package-dir"]["roundexport.runtime"] / "server"
    shipped = {path for pattern in patterns for path in folder.glob(pattern)}
    assert {PAGE / name for name in FILES} <= shipped


def test_no_script_or_style_stands_inside() -> None:
    assert not INDEX.inline
    for tag, values in INDEX.found:
        assert tag != "style" and "style" not in values, (tag, values)
        assert not [name for name in values if name.startswith("on")], (tag, values)
        assert tag != "script" or values.get("src")


def test_the_policy_lets_nothing_else_in() -> None:
    policy = next(values["content"] for tag, values in INDEX.found if values.get("http-equiv"))
    rules = dict(rule.split(" ", 1) for rule in re.split(r";\s+", policy))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    assert set(rules.values()) == {"'self'"}


def test_every_file_is_used_and_there() -> None:
    named = {values.get("src") or values.get("href", "") for tag, values in INDEX.found if tag in {"script", "link"}}
    used = {name.removeprefix("page/") for name in named}
    for name in SCRIPTS:
        used |= set(re.findall(r'from "\./([^"]+)"', FILES[name]))
    assert used | {"index.html"} == FILES.keys()


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_text_becomes_markup_or_code(name: str) -> None:
    found = re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function|setTimeout\(\s*[\"'`]",
        FILES[name],
    )
    assert not found


def test_every_field_has_a_label() -> None:
    labels = {values.get("for") for tag, values in INDEX.found if tag == "label"}
    fields = {values["id"] for tag, values in INDEX.found if tag in {"input", "textarea", "select"}}
    assert fields and fields <= labels


def light_and_dark(name: str) -> tuple[str, str]:
    found = re.search(rf"--{name}: light-dark\((#\w{{6}}), (#\w{{6}})\)", FILES["base.css"])
    assert found, name
    return found[1], found[2]


def luminance(color: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


TEXT, SHAPE = 4.5, 3.0  # least contrast, AA
PAIRS = [(ink, ground, TEXT) for ink in ("ink", "soft", "accent", "fault") for ground in ("paper", "sheet")]
PAIRS += [
    ("on-accent", "accent", TEXT),
    ("edge", "paper", SHAPE),
    ("bits-4", "paper", SHAPE),
    ("bits-8", "paper", SHAPE),
]


@pytest.mark.parametrize(("above", "below", "least"), PAIRS)
def test_colors_can_be_read(above: str, below: str, least: float) -> None:
    for one, other in zip(light_and_dark(above), light_and_dark(below), strict=True):
        assert contrast(one, other) >= least, (above, one, below, other)


def test_bits_can_be_told_apart() -> None:
    """More bits, more contrast, each step by a fifth at least; the legend says which is which."""
    for theme in (0, 1):
        paper = light_and_dark("paper")[theme]
        steps = [contrast(light_and_dark(f"bits-{bits}")[theme], paper) for bits in (2, 3, 4, 8)]
        assert all(later / earlier > 1.2 for earlier, later in pairwise(steps)), steps
