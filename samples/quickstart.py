"""What the conversion cost and gained, beside what you would get otherwise: quickstart.py OUT (after quickstart.sh).

Makes the rivals at the same group size (round-to-nearest on ONNX; NNCF data-free and data-aware on OpenVINO, from a
float package of the same graph), writes text with both packages, and prints one table: size, loss against the float
model on held-out text, and speed, all contestants timed in turn.
"""

import json
import sys
from pathlib import Path

from comparison import CALIBRATION, HERE, Float, measure, table
from nncf_package import compress

import roundexport
from roundexport.runtime import GenerationSettings, load, machine_info

MODEL = HERE / "model"
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


def main() -> None:
    out = Path(sys.argv[1])
    ours = {"roundexport, ONNX": out / "ours" / "onnx", "roundexport, OpenVINO": out / "ours" / "openvino"}
    show_text(ours)
    size = (MODEL / "model.safetensors").stat().st_size
    rows = measure(MODEL, Float("bfloat16 file, float32 in PyTorch", MODEL, size), {**ours, **make_rivals(out)})
    print(f"\n{table(rows)}")
    (out / "quickstart.json").write_text(json.dumps({"machine": machine_info(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
