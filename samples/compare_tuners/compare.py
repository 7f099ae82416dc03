"""Tuners side by side: same model, calibration tokens and scheme; loss against the float model in one evaluator.

    python samples/compare_tuners/compare.py --scheme 4,128,asym --scheme 2,64,sym
    python samples/compare_tuners/compare.py --auto-round path/to/its/env/bin/python      also auto-round, see README.md

Every tuner runs in a process of its own, whose CPU seconds (user + system, start-up included) and peak memory are what
the table shows.  Embeddings stay float for all.  Weights are compared after dequantisation, so no runtime's arithmetic
is in the figures: KL(float ‖ quantised) per token with its standard error over windows, top-1 agreement, perplexity.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from roundexport.artifact import Artifact
from roundexport.blocks import weight_of
from roundexport.calibration import load_calibration
from roundexport.checkpoint import Checkpoint

HERE = Path(__file__).resolve().parent
SAMPLES = HERE.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SAMPLES / "model"))
    parser.add_argument("--calibration", default=str(SAMPLES / "text" / "calibration.txt"))
    parser.add_argument("--text", default=str(SAMPLES / "text" / "heldout.txt"), help="held-out text")
    parser.add_argument("--scheme", action="append", help="bits,group,sym|asym; may be given more than once")
    parser.add_argument("--tuner", action="append", help="rtn, signround or auto-round; may be given more than once")
    parser.add_argument("--auto-round", help="python of an environment that holds auto-round")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    tuners = options.tuner or ["rtn", "signround", *(["auto-round"] if options.auto_round else [])]
    torch.set_num_threads(options.threads)
    checkpoint = Checkpoint.open(options.model)
    calibration = load_calibration(checkpoint, options.calibration)
    evaluator = Evaluator(checkpoint, load_calibration(checkpoint, options.text).ids[:64])
    print(f"calibration {calibration.ids.shape}, held out {evaluator.ids.shape}, {options.threads} threads", flush=True)
    print(f"{'scheme':12} {'tuner':12} {'KL':>20} {'top-1':>7} {'ppl':>8} {'CPU s':>7} {'wall s':>7} {'peak GiB':>9}")
    for scheme in options.scheme or ["4,128,asym", "4,128,sym"]:
        for tuner in tuners:
            with tempfile.TemporaryDirectory() as scratch:
                np.save(f"{scratch}/ids.npy", calibration.ids)
                cost = run(command(tuner, scheme, scratch, options), options.threads)
                row = evaluator.measure(Path(scratch) / "out", is_artifact=tuner != "auto-round")
            print(f"{scheme:12} {tuner:12} {row} {cost}", flush=True)


def command(tuner: str, scheme: str, scratch: str, options: argparse.Namespace) -> list[str]:
    """Command line of one tuner, writing to ``scratch``/out."""
    bits, group, kind = scheme.split(",")
    if tuner == "auto-round":
        settings = {"bits": int(bits), "group_size": int(group), "sym": kind == "sym", "iters": options.steps}
        side = HERE / "auto_round_side.py"
        return [
            options.auto_round,
            str(side),
            options.model,
            f"{scratch}/ids.npy",
            f"{scratch}/out",
            json.dumps(settings),
        ]
    return [
        str(Path(sys.executable).with_name("roundexport")), "tune", options.model, f"{scratch}/out",
        "--algorithm", tuner, "--bits", bits, "--group-size", group, "--symmetric" if kind == "sym" else "--asymmetric",
        "--embedding-bits", "none", "--calibration", options.calibration, "--steps", str(options.steps),
    ]  # fmt: skip


def run(line: list[str], threads: int) -> str:
    """Run one tuner; returns its CPU seconds, wall seconds and peak memory as text."""
    since = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(line, env=environment, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            sys.exit(f"{' '.join(line)} failed:\n{log.read().decode()[-3000:]}")
    seconds = used.ru_utime + used.ru_stime
    return f"{seconds:7.0f} {time.monotonic() - since:7.0f} {used.ru_maxrss / 2**20:9.2f}"


class Evaluator:
    """Compares quantised weights with the float model on windows of held-out tokens [n, length]."""

    def __init__(self, checkpoint: Checkpoint, ids: np.ndarray) -> None:
        self.checkpoint = checkpoint
        self.ids = torch.from_numpy(ids)
        self.reference = checkpoint.load_model()

    def measure(self, folder: Path, is_artifact: bool) -> str:
        """Figures of an artifact, or of a folder of dequantised weights, as text."""
        if is_artifact:
            model = self.checkpoint.load_model()
            artifact = Artifact.open(folder)
            for name in artifact.names():
                weight_of(model.get_submodule(name)).copy_(torch.from_numpy(artifact.linear(name).dequantize()))
        else:
            model = Checkpoint.open(next(folder.rglob("config.json")).parent).load_model()
        kl, same, loss = [], [], []
        for part in self.ids.split(4):
            with torch.no_grad():
                p, q = (torch.log_softmax(m(input_ids=part).logits.float(), -1) for m in (self.reference, model))
            kl.append((p.exp() * (p - q)).sum(-1).mean(1))
            same.append((p.argmax(-1) == q.argmax(-1)).float().mean(1))
            loss.append(-q[:, :-1].gather(-1, part[:, 1:, None]).mean((1, 2)))
        values, agree, nll = torch.cat(kl), torch.cat(same), torch.cat(loss)
        error = values.std() / len(values) ** 0.5
        return f"{values.mean():10.5f} ± {error:.5f} {agree.mean():7.4f} {nll.mean().exp():8.3f}"


if __name__ == "__main__":
    main()
