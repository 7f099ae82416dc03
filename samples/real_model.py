"""SmolLM2-135M-Instruct in 4 bits: real_model.py MODEL.gguf OUT (see real_model.sh, which fetches the model).

Hidden size 576 is 9·64, so groups of 128 do not divide it; everybody uses groups of 64, and 8-bit embeddings.
Contestants: the float model, ours and round-to-nearest on each runtime, ours on ONNX Runtime once more with our own
operator where a C++ compiler can build it, and NNCF's best (AWQ, scale estimation and GPTQ on the calibration text) on
OpenVINO.  Every step that is finished is kept in OUT and not done again.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from comparison import CALIBRATION, Float, Scale, measure, say, table
from nncf_package import compress

import roundexport
from roundexport.kernels.native import build
from roundexport.runtime import machine_info

GROUP = 64
QUESTIONS = ("What is the capital of France?", "How many days are in a week?", "What do bees make?")
REMARK = (
    "The model's weights were rounded to 4 bits in blocks of 32 when its GGUF file was made (Q4_1), and what is called "
    "float here\nis those values: this flatters every scheme whose grid is like the file's."
)


@dataclass(frozen=True)
class Plan:
    """How much is done."""

    targets: tuple[str, ...]
    ours: roundexport.TuneSettings
    scale: Scale
    nncf_best: bool
    own_operator: bool
    answer_len: int
    four_bit_head: bool = False

    @classmethod
    def from_environment(cls) -> "Plan":
        """What the variables of real_model.sh ask for."""
        quick = os.environ.get("ROUNDEXPORT_REAL_QUICK", "0") not in ("", "0")
        recipe = os.environ.get("ROUNDEXPORT_REAL_RECIPE") or ("light" if quick else "default")
        if quick:
            little = roundexport.TuneSettings(
                recipe=recipe, group_size=GROUP, calibration=str(CALIBRATION), num_samples=8, sample_len=128
            )
            scale = Scale(windows=2, window_len=128, prompt_len=32, output_len=16, rounds=1)
            return cls(("onnx",), little, scale, nncf_best=False, own_operator=False, answer_len=24)
        windows = int(os.environ.get("ROUNDEXPORT_REAL_WINDOWS", "16"))
        samples = int(os.environ.get("ROUNDEXPORT_REAL_SAMPLES", "128"))
        settings = roundexport.TuneSettings(recipe=recipe, group_size=GROUP, num_samples=samples)
        rival = os.environ.get("ROUNDEXPORT_REAL_NNCF", "1") not in ("", "0")
        return cls(
            ("onnx", "openvino"), settings, Scale(windows=windows), nncf_best=rival,
            own_operator=build.compiler() is not None, answer_len=48,
            four_bit_head=os.environ.get("ROUNDEXPORT_REAL_HEAD4", "0") not in ("", "0"),
        )  # fmt: skip


class Steps:
    """Runs what is not there yet, says what, and how long it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def make(self, folder: Path, what: str, how: Callable[[], object]) -> Path:
        """``folder``, made by ``how`` if it is not there."""
        if not folder.exists():
            say(f"== {what}")
            began = time.monotonic()
            how()
            self.seconds[what] = round(time.monotonic() - began, 1)
            say(f"== {what}: {self.seconds[what]} s")
        return folder


def make_packages(model: Path, out: Path, plan: Plan, steps: Steps) -> dict[str, Path]:
    """Package by contestant; the float one under ``""`` is there to answer questions and to make NNCF's of."""
    plain = roundexport.TuneSettings(recipe="rtn", group_size=GROUP)
    packages = {}
    makers = [("roundexport", "ours", plan.ours), ("round-to-nearest", "rtn", plain)]
    if plan.four_bit_head:
        makers.append(("roundexport, head 4 bits", "head4", dataclasses.replace(plan.ours, embedding_bits=4)))
    for label, key, settings in makers:
        artifact = steps.make(
            out / f"{key}-artifact",
            f"{label}: tuning, recipe {settings.recipe}",
            lambda settings=settings, key=key: roundexport.tune(model, out / f"{key}-artifact", settings),
        )
        for target in plan.targets:
            folder = out / f"{key}-{target}"
            packages[f"{label}, {target}"] = steps.make(
                folder,
                f"{label}: exporting to {target}",
                lambda a=artifact, f=folder, t=target: roundexport.export(a, f, to=t, model=model),
            )
    if plan.own_operator:
        steps.make(build.default_path(), "building the operator", build.build)
        packages["roundexport --kernels, onnx"] = steps.make(
            out / "ours-kernels",
            "roundexport: exporting to onnx with the operator",
            lambda: roundexport.export(
                out / "ours-artifact", out / "ours-kernels", to="onnx", model=model, settings={"kernels": True}
            ),
        )
    target = plan.targets[-1]
    floating = steps.make(
        out / f"float-{target}",
        f"float: exporting to {target}",
        lambda: roundexport.export(model, out / f"float-{target}", to=target),
    )
    if plan.nncf_best:
        packages["NNCF AWQ+SE+GPTQ, openvino"] = steps.make(
            out / "nncf",
            "NNCF: AWQ, scale estimation, GPTQ",
            lambda: compress(floating, out / "nncf", GROUP, CALIBRATION),
        )
    return {"": floating, **packages}


def answers(packages: dict[str, Path], length: int) -> dict[str, dict[str, str]]:
    """Greedy answers to the questions, through the chat template, by contestant."""
    found: dict[str, dict[str, str]] = {question: {} for question in QUESTIONS}
    for name, folder in packages.items():
        say(f"{name or 'float'}: answering")
        for question in QUESTIONS:
            answer = roundexport.generate(folder, question, chat=True, max_new_tokens=length)
            found[question][name or "float"] = " ".join(answer.text.split())
    return found


def main() -> None:
    model, out = Path(sys.argv[1]), Path(sys.argv[2])
    plan, steps = Plan.from_environment(), Steps()
    checkpoint = roundexport.Checkpoint.open(model)
    packages = make_packages(model, out, plan, steps)
    said = answers(packages, plan.answer_len)
    floating = Float("GGUF Q4_1 file, float32 in PyTorch", checkpoint.folder, model.stat().st_size)
    rows = measure(model, floating, {name: folder for name, folder in packages.items() if name}, plan.scale)

    text = f"{table(rows, plan.scale)}\n\n{REMARK}\n"
    for question, by_name in said.items():
        text += f"\n**{question}**\n\n" + "".join(f"- {name}: {answer}\n" for name, answer in by_name.items())
    print(f"\n{text}")
    (out / "real_model.md").write_text(text, encoding="utf-8")
    document = {"machine": machine_info(), "rows": rows, "answers": said, "seconds": steps.seconds, "remark": REMARK}
    (out / "real_model.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    say(f"kept in {out}: real_model.md, real_model.json")


if __name__ == "__main__":
    main()
