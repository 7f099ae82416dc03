"""Bytes of a report's drawings as roundexport draws them, and as matplotlib's SVG and plotly would hold the same data.

    pip install matplotlib plotly
    python samples/report_plot_sizes.py PACKAGE…

Drawn: the losses of every kind of layer before and after, bits per layer, and the histogram of KL per token.  A library
that is not installed is left out.  Plotly's script is counted once, as a file that stands alone has to hold it.
"""

from __future__ import annotations

import io
import sys
from typing import Any

from roundexport.reports.figure_plots import Spread, histogram
from roundexport.reports.gather import gather
from roundexport.reports.html_parts import both
from roundexport.reports.layer_plots import Losses, bits_of, bits_picture, loss_pictures, losses_of
from roundexport.reports.layers import grids

Data = tuple[list[list[int]], list[Losses], Spread | None]


def main(packages: list[str]) -> None:
    records, _ = gather(packages)
    sizes: dict[str, int] = {}
    for record in records:
        bits, losses = bits_of(record), losses_of(record)
        quality = (record.verification or {}).get("quality", {})
        spread = Spread.recorded(quality.get("kl_histogram"))
        grid = grids(bits)[0][0]
        table = [[bits[grid.cells[kind, block][0]] for block in grid.blocks] for kind in grid.kinds]
        ours = both(lambda width, bits=bits: bits_picture(bits, width)) + "".join(
            d.svg() for d in loss_pictures(losses)
        )
        if spread is not None:
            ours += histogram(spread, 320, "KL", "nats", spread.between(), []).svg()
        sizes["roundexport"] = sizes.get("roundexport", 0) + len(ours.encode())
        for name, draw in (("matplotlib", _matplotlib), ("plotly", _plotly)):
            try:
                sizes[name] = sizes.get(name, 0) + draw((table, losses, spread))
            except ImportError:
                sizes.pop(name, None)
    if "plotly" in sizes:
        from plotly.offline import get_plotlyjs

        sizes["plotly's script"] = len(get_plotlyjs().encode())
    for name, size in sizes.items():
        print(f"{name:16s} {size / 1024:9.1f} KiB")


def _matplotlib(data: Data) -> int:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"  # words stay words: the smaller form
    from matplotlib import pyplot as plt

    table, losses, spread = data
    drawn = []

    def keep(figure: Any) -> None:
        out = io.StringIO()
        figure.savefig(out, format="svg", bbox_inches="tight")
        plt.close(figure)
        drawn.append(out.getvalue())

    figure, axes = plt.subplots(figsize=(7, 2))
    axes.pcolormesh(table, edgecolors="w")
    keep(figure)
    for entry in losses:
        figure, axes = plt.subplots(figsize=(1.6, 1.4))
        axes.semilogy(list(entry.before), list(entry.before.values()), "--")
        axes.semilogy(list(entry.after), list(entry.after.values()))
        axes.set_title(entry.name)
        keep(figure)
    if spread is not None:
        figure, axes = plt.subplots(figsize=(3.3, 1.7))
        axes.bar(spread.edges, spread.counts[1:], width=[0.7 * edge for edge in spread.edges])
        axes.set_xscale("log")
        keep(figure)
    return sum(len(text.encode()) for text in drawn)


def _plotly(data: Data) -> int:
    import plotly.graph_objects as go

    table, losses, spread = data
    figures = [go.Figure(go.Heatmap(z=table))]
    for entry in losses:
        lines = [go.Scatter(x=list(part), y=list(part.values())) for part in (entry.before, entry.after)]
        figures.append(go.Figure(lines, layout={"title": entry.name, "yaxis": {"type": "log"}}))
    if spread is not None:
        bars = go.Bar(x=list(spread.edges), y=list(spread.counts[1:]))
        figures.append(go.Figure(bars, layout={"xaxis": {"type": "log"}}))
    return sum(len(figure.to_html(full_html=False, include_plotlyjs=False).encode()) for figure in figures)


if __name__ == "__main__":
    main(sys.argv[1:])
