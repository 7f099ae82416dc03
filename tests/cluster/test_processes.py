"""Workers that are processes: one is killed at its work, another loses its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from cluster_toys import shared
from tuning_tools import Models

from roundexport.cluster.messages import call, result
from roundexport.cluster.pool import about
from roundexport.cluster.processes import ProcessPool

ORPHAN = """
import sys
from roundexport.cluster.messages import call, result
from roundexport.cluster.pool import about
from roundexport.cluster.processes import ProcessPool
if __name__ == "__main__":
    pool = ProcessPool(1, 1)
    print(result(pool.submit(0, call(about)).result()).pid, flush=True)
    sys.stdin.read()
"""


class Killing(ProcessPool):
    """Kills a process in the middle of what it does, once."""

    killed = 0

    def submit(self, place, message):
        future = super().submit(place, message)
        self.sent = getattr(self, "sent", 0) + 1
        if self.sent == 12:
            os.kill(self._pids[place].result(), signal.SIGKILL)
            self.killed += 1
        return future


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forked from a process that has imported what each of them would import for five CPU seconds."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["roundexport.cluster.block_parts", "transformers.models.llama.modeling_llama"])
        monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)


def test_a_worker_that_is_killed_changes_no_byte(
    models: Models, calibration_text: Path, tmp_path: Path, forked: None
) -> None:
    pool = Killing(2, 1)
    try:
        pids = [result(pool.submit(place, call(about)).result()).pid for place in range(2)]
        assert len({os.getpid(), *pids}) == 3
        found = shared(models("llama, one block"), tmp_path / "shared", calibration_text, pool)
    finally:
        pool.close()
    assert pool.killed == 1
    assert found == shared(models("llama, one block"), tmp_path / "plain", calibration_text, None)
    assert not any(psutil.pid_exists(pid) for pid in pids), "processes are left"


@pytest.mark.skipif(os.name != "posix", reason="a parent is killed by a signal")
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    parent = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    worker.wait(60)
