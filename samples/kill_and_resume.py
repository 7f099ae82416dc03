"""Kill a tuning run with SIGKILL at random moments, run it again, and hold its bytes against those of a whole run.

    python samples/kill_and_resume.py                                  ten moments, recipe default, the sample model
    python samples/kill_and_resume.py --moments 4 --seed 7 -- --finish end_to_end --steps 20
    python samples/kill_and_resume.py -- --transform teq --steps 20    what follows -- goes to `roundexport tune`

One run is left alone and timed.  Moments are then drawn from the whole of that time: in each trial the run's process
group is killed there, and what it left is run again to its end; every third trial is killed a second time on the way.
A row says how far the run had come, as its state folder tells it, and whether every file has the sha256 of the whole
run's.  The exit code is 1 if any differs.  A run that was through before its moment came is compared all the same.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SAMPLES = Path(__file__).resolve().parent
SMALL = ("--num-samples", "8", "--sample-len", "64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SAMPLES / "model"))
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", help="further flags of `roundexport tune`, after --")
    options = parser.parse_args()
    script = str(Path(sys.executable).with_name("roundexport"))
    command = [script, "tune", options.model, "--recipe", options.recipe, *SMALL, *options.flags]
    with tempfile.TemporaryDirectory() as folder:
        whole, since = Path(folder) / "whole", time.monotonic()
        run([*command, str(whole)])
        seconds, expected = time.monotonic() - since, sums(whole)
        print(f"{' '.join(command[1:])}: {len(expected)} files, {seconds:.1f} s\n")
        print(f"{'killed after':>12}  {'done by then':42} same bytes")
        draw, different = random.Random(options.seed), 0
        for trial in range(options.moments):
            out, found = Path(folder) / f"trial-{trial}", []
            for _ in range(2 if trial % 3 == 2 else 1):
                moment = draw.uniform(0, seconds)
                run([*command, str(out)], moment)
                found.append((moment, progress(out)))
                if out.exists():
                    break
            if not out.exists():
                run([*command, str(out)])
            same = sums(out) == expected and not out.with_name(f"{out.name}.partial").exists()
            different += not same
            for number, (moment, done) in enumerate(found, 1):
                print(
                    f"{moment:10.1f} s  {done:42} {'' if number < len(found) else 'yes' if same else 'NO'}", flush=True
                )
    print(f"\n{options.moments - different} of {options.moments} gave the bytes of the run that was left alone")
    sys.exit(1 if different else 0)


def run(command: list[str], moment: float | None = None) -> None:
    """Run to the end, or kill the process and all it started after ``moment`` seconds."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        text, _ = process.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{text.decode()}")


def progress(out: Path) -> str:
    """How far a run had come."""
    state = out.with_name(f"{out.name}.partial")
    if out.exists():
        return "all, state still there" if state.exists() else "all"
    if not (state / "state.json").exists():
        return "nothing"
    document = json.loads((state / "state.json").read_text())
    text = f"{document['blocks_done']} blocks, {len(document['layers_done'])} layers"
    if (state / "artifact" / "manifest.json").exists():
        return f"{text}, manifest" + (", finish begun" if list(state.glob("finish*")) else "")
    return text if document["layers_done"] else "samples" if document["calibration"] else "state begun"


def sums(folder: Path) -> dict[str, str]:
    """Sha256 of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    main()
