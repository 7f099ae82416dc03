"""KL against real bits per weight, from rows that compare.py wrote with --json.

usage: python plot.py ROWS.jsonl [OUT.png]          needs matplotlib
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rows import points


def plot(file: Path, out: Path) -> None:
    """One line per contestant, from few bits to many; bars are two standard errors; lower is better."""
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    for label, schemes in points(file).items():
        rows = sorted(schemes.values(), key=lambda row: row["bits_per_weight"])
        x, y = [row["bits_per_weight"] for row in rows], [row["kl"] for row in rows]
        axes.errorbar(x, y, [2 * row["kl_se"] for row in rows], marker="o", markersize=4, capsize=2, label=label)
    axes.set(
        xlabel="bits per weight, scales and zero points included",
        ylabel="KL(float ‖ quantized), nats per token",
        yscale="log",
    )
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    plot(source, Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".png"))
