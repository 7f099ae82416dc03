"""A forked process is what a new one would be: its own streams, folder, environment and exit code."""

from __future__ import annotations

import signal
from pathlib import Path

from warm_python import WarmPython

SHOWN = """
import os, sys
ours = [name for name in sys.modules if name.partition(".")[0] == "roundexport"]
print(sys.argv[1:], os.getcwd(), os.environ, __name__, "torch" in sys.modules, ours)
print("told", file=sys.stderr)
sys.exit(7)
"""


def test_it_has_what_was_given_and_torch(warm: WarmPython, tmp_path: Path) -> None:
    done = warm.run(SHOWN, tmp_path, "two words", env={"ONLY": "this"}, cwd=tmp_path)
    told = f"[{str(tmp_path)!r}, 'two words'] {tmp_path} environ({{'ONLY': 'this'}}) __main__ True []\n"
    assert (done.returncode, done.stdout, done.stderr) == (7, told, "told\n")


def test_an_error_is_told_and_a_kill_is_seen(warm: WarmPython) -> None:
    failed = warm.run("import fcntl\nraise ValueError('so it is')")
    assert failed.returncode == 1 and failed.stderr.endswith("ValueError: so it is\n") and not failed.stdout
    sleeping = warm.start("import time; time.sleep(60)")
    assert sleeping.poll() is None
    sleeping.kill()
    assert sleeping.wait() == sleeping.poll() == -signal.SIGKILL
