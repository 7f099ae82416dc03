"""What the conversion cost and gained, beside what you would get otherwise: quickstart.py OUT (after quickstart.sh).

Makes the rivals at the same group size (round-to-nearest on ONNX; NNCF data-free and data-aware on OpenVINO, from a
float package of the same graph), writes text with both packages, and prints one table: size, loss against the float
model on held-out text, and speed, all contestants timed in turn.
"""

import json
import sys
from math import prod
from pathlib import Path

from nncf_package import compress

import roundexport
from roundexport.formats.package import read_package
from roundexport.model.checkpoint import Checkpoint
from roundexport.runtime import Contestant, GenerationSettings, load
from roundexport.runtime.benchmarking.bench import package_contestant
from roundexport.runtime.machine import machine_info
from roundexport.threads import choose_threads
from roundexport.verification.verify import DecoderQuality

HERE = Path(__file__).resolve().parent
MODEL, CALIBRATION, HELDOUT = HERE / "model", HERE / "text" / "calibration.txt", HERE / "text" / "heldout.txt"
PROMPT = "It was late in the evening when"


def make_rivals(out: Path) -> dict[str, Path]:
    """Packages that other tools give at 4 bits, group 128, with 8-bit embeddings."""
    rtn, plain = out / "rtn", out / "openvino-float"
    if not (out / "rtn-artifact").exists():
        roundexport.tune(MODEL, out / "rtn-artifact", roundexport.TuneSettings(recipe="rtn"), progress=False)
    if not rtn.exists():
        roundexport.export(out / "rtn-artifact", rtn, to="onnx")
    if not plain.exists():
        roundexport.export(MODEL, plain, to="openvino")
    for name, text in (("nncf", None), ("nncf-aware", CALIBRATION)):
        if not (out / name).exists():
            compress(plain, out / name, 128, text)
    return {
        "round-to-nearest, ONNX": rtn,
        "NNCF, OpenVINO": out / "nncf",
        "NNCF AWQ+SE+GPTQ, OpenVINO": out / "nncf-aware",
    }


def show_text(packages: dict[str, Path]) -> None:
    settings = GenerationSettings(max_new_tokens=40, temperature=0.8, top_p=0.9, seed=1)
    for name, folder in packages.items():
        print(f"\n{name}:\n  {PROMPT}", end="")
        for step in load(folder).generate([PROMPT], settings):
            print(step.text[0].replace("\n", " "), end="", flush=True)
        print()


def figures(packages: dict[str, Path]) -> list[dict[str, str]]:
    """One row per contestant, the float model first."""
    checkpoint = Checkpoint.open(MODEL)
    parameters = sum(map(prod, checkpoint.owned().values()))
    threads = choose_threads().count
    floating = Contestant(
        "bfloat16 file, float32 in PyTorch", (sys.executable, str(HERE / "torch_worker.py"), str(MODEL), str(threads))
    )
    timed = [floating, *(package_contestant(folder, name, threads=threads) for name, folder in packages.items())]
    report = roundexport.bench(timed, prompt_lens=[128], output_len=64, rounds=5, threads=threads)
    speed = {row["contestant"]: row for row in report.rows()}
    quality = {
        name: roundexport.verify(folder, against=MODEL, text=HELDOUT).quality for name, folder in packages.items()
    }
    rows = [row(floating.name, (MODEL / "model.safetensors").stat().st_size, parameters, None, speed)]
    rows[0]["perplexity"] = f"{next(iter(quality.values())).perplexity_float:.2f}"
    rows += [row(name, weight_bytes(folder), parameters, quality[name], speed) for name, folder in packages.items()]
    return rows


def weight_bytes(folder: Path) -> int:
    """Size of the files that hold the graph's weights."""
    files = read_package(folder, check_hashes=False).files
    return sum(entry["size"] for name, entry in files.items() if name in {"model.onnx.data", "openvino_model.bin"})


def row(
    name: str, size: int, parameters: int, quality: DecoderQuality | None, speed: dict[str, dict]
) -> dict[str, str]:
    timed = speed[name]
    return {
        "": name,
        "MiB": f"{size / 2**20:.2f}",
        "bits/weight": f"{8 * size / parameters:.2f}",
        "KL": f"{quality.kl.mean:.5f} ± {quality.kl.stderr:.5f}" if quality else "0",
        "top-1": f"{100 * quality.top1.mean:.1f} %" if quality else "100 %",
        "perplexity": f"{quality.perplexity:.2f}" if quality else "",
        "TTFT ms": f"{timed['ttft_ms']:.1f}",
        "TPOT ms": f"{timed['tpot_ms']:.2f}",
        "decode tok/s": f"{timed['decode_tps']:.0f}",
    }


def show(rows: list[dict[str, str]]) -> None:
    """Print the rows as a Markdown table, with the machine above it."""
    machine = machine_info()
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(f"\n{machine['cpu']}, {' '.join(machine['instruction_sets'])}, {choose_threads().count} threads; {versions}")
    print("KL in nats per token and top-1 agreement against the float model, ± standard error over 32 windows of 512")
    print(
        "held-out tokens, each package on its own runtime as shipped; prompt of 128 tokens, 64 written, five rounds\n"
    )
    widths = {key: max(len(key), *(len(r[key]) for r in rows)) for key in rows[0]}
    for line in (dict(zip(widths, widths, strict=True)), {key: "-" * width for key, width in widths.items()}, *rows):
        print("| " + " | ".join(line[key].ljust(width) for key, width in widths.items()) + " |")


def main() -> None:
    out = Path(sys.argv[1])
    ours = {"roundexport, ONNX": out / "ours" / "onnx", "roundexport, OpenVINO": out / "ours" / "openvino"}
    show_text(ours)
    rows = figures({**ours, **make_rivals(out)})
    show(rows)
    (out / "quickstart.json").write_text(json.dumps({"machine": machine_info(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
