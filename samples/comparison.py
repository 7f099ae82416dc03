"""One table of packages beside their float model: size, loss on held-out text, speed; for quickstart and real_model.

Losses are those of `roundexport verify`, each package on its own runtime as it ships; times are those of
`roundexport bench`, every contestant in a process of its own, all asked in turn.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import roundexport
from roundexport.environment.threads import choose_threads
from roundexport.runtime import machine_info, package_contestant
from roundexport.runtime.benchmarking.contestants import torch_contestant

HERE = Path(__file__).resolve().parent
CALIBRATION, HELDOUT = HERE / "text" / "calibration.txt", HERE / "text" / "heldout.txt"
WEIGHTS = ("model.onnx.data", "openvino_model.bin")


@dataclass(frozen=True)
class Scale:
    """How much is measured: windows and tokens of held-out text, prompt and answer in tokens, rounds."""

    windows: int = 32
    window_len: int = 512
    prompt_len: int = 128
    output_len: int = 64
    rounds: int = 5

    def __str__(self) -> str:
        return (
            f"± standard error over {self.windows} windows of {self.window_len} held-out tokens,\n"
            f"each package on its own runtime as shipped; prompt of {self.prompt_len} tokens, {self.output_len} "
            f"written, medians of {self.rounds} rounds, all contestants in turn, TTFT without tokenization"
        )


@dataclass(frozen=True)
class Float:
    """The float model as a contestant: what it is called, its folder, and the size of its file."""

    name: str
    folder: Path
    size: int


def measure(
    model: Path, floating: Float, packages: Mapping[str, Path], scale: Scale | None = None
) -> list[dict[str, Any]]:
    """One row of numbers per contestant, the float model in PyTorch first.

    Args:
        model: the float model, as the packages' source names it.
        floating: the same as a folder that transformers loads.
        packages: folder by name.
        scale: how much to measure.
    """
    scale = scale or Scale()
    threads = choose_threads().count
    timed = [torch_contestant(str(floating.folder), floating.name, threads=threads)]
    timed += [package_contestant(folder, name, threads=threads) for name, folder in packages.items()]
    report = roundexport.bench(
        timed, prompt_lens=[scale.prompt_len], output_len=scale.output_len, rounds=scale.rounds, threads=threads,
        on_progress=say,
    )  # fmt: skip
    speed = {row["contestant"]: row for row in report.rows()}
    parameters = roundexport.inspect(str(model)).facts["parameters"]
    rows = [{"": floating.name, "bytes": floating.size, "kl": 0.0, "kl_se": 0.0, "top1": 1.0}]
    for name, folder in packages.items():
        say(f"{name}: comparing with the float model")
        quality = roundexport.verify(
            folder, against=model, text=HELDOUT, num_samples=scale.windows, sample_len=scale.window_len
        ).quality
        rows[0]["perplexity"] = quality.perplexity_float
        rows.append(
            {"": name, "bytes": weight_bytes(folder), "kl": quality.kl.mean, "kl_se": quality.kl.stderr,
             "top1": quality.top1.mean, "perplexity": quality.perplexity}
        )  # fmt: skip
    for row in rows:
        row["bits_per_weight"] = 8 * row["bytes"] / parameters
        row |= {key: speed[row[""]][key] for key in ("ttft_ms", "tpot_ms", "decode_tps")}
    return rows


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def weight_bytes(folder: Path) -> int:
    """Size of the files that hold the graph's weights."""
    return sum((folder / name).stat().st_size for name in WEIGHTS if (folder / name).is_file())


def as_text(row: Mapping[str, Any]) -> dict[str, str]:
    """A row as a reader wants it."""
    exact = row["top1"] == 1.0 and row["kl"] == 0.0
    return {
        "": row[""],
        "MiB": f"{row['bytes'] / 2**20:.2f}",
        "bits/weight": f"{row['bits_per_weight']:.2f}",
        "KL": "0" if exact else f"{row['kl']:.5f} ± {row['kl_se']:.5f}",
        "top-1": "100 %" if exact else f"{100 * row['top1']:.1f} %",
        "perplexity": f"{row['perplexity']:.2f}",
        "TTFT ms": f"{row['ttft_ms']:.1f}",
        "TPOT ms": f"{row['tpot_ms']:.2f}",
        "decode tok/s": f"{row['decode_tps']:.0f}",
    }


def table(rows: list[dict[str, Any]], scale: Scale | None = None) -> str:
    """The rows as a Markdown table that is also readable as text, with the machine above it."""
    machine, lines, threads = machine_info(), [as_text(row) for row in rows], choose_threads().count
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    widths = {key: max(len(key), *(len(line[key]) for line in lines)) for key in lines[0]}
    header = [dict(zip(widths, widths, strict=True)), {key: "-" * width for key, width in widths.items()}]
    return "\n".join(
        [
            f"{machine['cpu']}, {' '.join(machine['instruction_sets'])}, {threads} threads; {versions}",
            f"KL in nats per token and top-1 agreement against the float model, {scale or Scale()}",
            "",
            *("| " + " | ".join(line[key].ljust(widths[key]) for key in widths) + " |" for line in [*header, *lines]),
        ]
    )
