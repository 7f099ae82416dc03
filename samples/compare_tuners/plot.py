"""KL against real bits per weight as an SVG file, from rows that compare.py wrote with --json.

usage: python plot.py ROWS.jsonl [OUT.svg]

One line per contestant and symmetry, from few bits to many; asymmetric ones are dashed, bars are two standard errors,
KL is on a logarithmic axis, lower is better.  llama.cpp's types make one line.  Names stand beside the plot in the
order of KL at each line's most bits.  The file needs nothing else and has colors for light and dark.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import PROJECTS, points, scheme

from roundexport.reports.svg import LINE, Axis, Drawing

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BELOW = 860.0, 476.0, 52.0, 640.0, 16.0, 432.0
COLORS = ("#0b66c3", "#c2410c", "#15803d", "#7e22ce", "#b4860b", "#0e7490", "#be185d", "#57606a")
STYLE = """<style>
svg{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;--ink:#1f2328;--soft:#59636e;
--rule:#d1d9e0}
@media(prefers-color-scheme:dark){svg{--ink:#e6edf3;--soft:#9198a1;--rule:#3d444d}.hue{filter:brightness(1.6)}}
text{fill:var(--ink)}.soft{fill:var(--soft)}polyline{fill:none}.grid{stroke:var(--rule)}.axis{stroke:var(--soft)}
.line{stroke-width:2;stroke-linejoin:round}.dash{stroke-dasharray:5 3}
%s</style>"""


@dataclass(frozen=True)
class Series:
    """A contestant's rows of one symmetry, by bits; ``name`` is what the plot calls them."""

    name: str
    color: int
    dashed: bool
    rows: tuple[dict[str, Any], ...]


def family(row: dict[str, Any]) -> str:
    """The contestant, without version; all types of llama.cpp are one."""
    if row["tuner"] == "ours":
        if "when" in row:
            return f"ours, {row['label']} ({row['when'].replace('`', '')})"
        return "round-to-nearest" if row["label"] == "rtn" else f"ours, {row['label']}"
    settings = row["variant"] if row["tuner"] != "llama" else ""
    return f"{PROJECTS[row['tuner']]}{', ' if settings else ''}{settings}"


def series(rows: list[dict[str, Any]]) -> list[Series]:
    """The lines of the plot, those that lose most at their most bits first."""
    names = list(dict.fromkeys(map(family, rows)))
    lines: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["bits_per_weight"]):
        dashed = row["tuner"] != "llama" and row["scheme"].endswith("asym")
        lines.setdefault((family(row), dashed), []).append(row)
    found = [
        Series(f"{name}{', asym' if dashed else ''}", names.index(name) % len(COLORS), dashed, tuple(held))
        for (name, dashed), held in lines.items()
    ]
    return sorted(found, key=lambda one: -one.rows[-1]["kl"])


def draw(lines: list[Series]) -> Drawing:
    """The plot."""
    rows = [row for line in lines for row in line.rows]
    across = Axis.over([row["bits_per_weight"] for row in rows], LEFT, RIGHT)
    up = Axis.over([row["kl"] for row in rows], BELOW, TOP, log=True)
    drawing = Drawing(WIDTH, HEIGHT, "KL divergence to the float model over bits per weight, by tuner")
    drawing.bottom(across, BELOW, "bits per weight, scales and zero points included", TOP, 8)
    drawing.side(up, LEFT, RIGHT, 8)
    drawing.text(LEFT + 6, TOP + 10, "KL(float ‖ quantized), nats per token", "soft")
    for line in lines:
        hue = f"hue h{line.color}"
        path = [(across.at(row["bits_per_weight"]), up.at(row["kl"])) for row in line.rows]
        drawing.line(path, f"{hue} line{' dash' if line.dashed else ''}")
        for row, (x, y) in zip(line.rows, path, strict=True):
            ends = (up.at(row["kl"] - 2 * row["kl_se"]), up.at(row["kl"] + 2 * row["kl_se"]))
            drawing.line([(x, end) for end in ends], hue)
            kind = row["variant"] if row["tuner"] == "llama" else scheme(row)
            drawing.dot(x, y, 4, f"{hue} f{line.color}", f"{line.name}, {kind}: {row['kl']:.4f}")
    for place, line in enumerate(lines):
        y, hue = TOP + 12 + LINE * 1.4 * place, f"hue h{line.color}"
        drawing.line([(RIGHT + 16, y - 4), (RIGHT + 40, y - 4)], f"{hue} line{' dash' if line.dashed else ''}")
        drawing.dot(RIGHT + 28, y - 4, 4, f"{hue} f{line.color}")
        drawing.text(RIGHT + 48, y, line.name)
    return drawing


def standing_alone(drawing: Drawing) -> str:
    """A drawing as a file of its own."""
    colors = "".join(f".h{i}{{stroke:{c}}}.f{i}{{fill:{c}}}" for i, c in enumerate(COLORS))
    head, _, rest = drawing.svg().removeprefix("<svg").partition(">")
    return f'<svg xmlns="http://www.w3.org/2000/svg"{head}>{STYLE % colors}{rest}\n'


def main() -> None:
    source = Path(sys.argv[1])
    rows = [row for schemes in points(source).values() for row in schemes.values()]
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".svg")
    out.write_text(standing_alone(draw(series(rows))), encoding="utf-8")


if __name__ == "__main__":
    main()
