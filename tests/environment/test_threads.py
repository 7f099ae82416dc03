"""The number of threads: affinity, the quota of a control group, what the user asks for, and nonsense."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from control_group_toys import V2, machine

from roundexport.environment.threads import Threads, allowed_cores, choose_threads
from roundexport.errors import UsageError


@pytest.mark.parametrize(
    ("allowed", "cores"),
    [({0, 1, 2, 3}, 2), ({0, 2}, 1), ({0, 1}, 2), ({3}, 1), ({4, 5}, 2)],
    ids=["all", "two threads of one core", "two cores", "one", "no topology: each a core"],
)
def test_hyper_threads_of_one_core_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: set[int], cores: int
) -> None:
    root = machine(tmp_path, V2, {}, {0: (0, 0), 1: (0, 1), 2: (0, 0), 3: (0, 1)})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed, raising=False)
    assert allowed_cores(root) == cores


def test_quota_and_affinity_are_both_kept_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machine(tmp_path, V2, {"pod/cpu.max": "250000 100000\n"}, {i: (0, i) for i in range(8)})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert str(choose_threads(environment={}, root=root)) == "2 threads (CPU quota of 2.5 on 8 physical cores)"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5}, raising=False)
    assert str(choose_threads(environment={}, root=root)) == "1 thread (1 physical core)"
    (root / "sys/fs/cgroup/pod/cpu.max").write_text("20000 100000\n")
    assert choose_threads(environment={}, root=root).count == 1


def test_what_the_user_says_wins(tmp_path: Path) -> None:
    root = machine(tmp_path, V2, {"pod/cpu.max": "100000 100000\n"})
    assert choose_threads(environment={"OMP_NUM_THREADS": "5,2"}, root=root) == Threads(5, "OMP_NUM_THREADS")
    assert choose_threads(3, {"OMP_NUM_THREADS": "5"}, root) == Threads(3, "as requested")


@pytest.mark.parametrize("count", [0, -1, 99_999])
def test_absurd_numbers_are_refused(count: int) -> None:
    with pytest.raises(UsageError, match=f"threads must be from 1 to .* not {count}"):
        choose_threads(count)
    with pytest.raises(UsageError, match="OMP_NUM_THREADS must be"):
        choose_threads(environment={"OMP_NUM_THREADS": str(count)})


def test_a_variable_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(UsageError, match="OMP_NUM_THREADS must be a whole number, not 'many'"):
        choose_threads(environment={"OMP_NUM_THREADS": "many"})


def test_torch_computes_with_the_chosen_number_inside_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from roundexport.model import torch_threads as module

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        monkeypatch.setattr(module, "choose_threads", lambda: Threads(2, "quota"))
        with module.torch_threads() as chosen:
            assert chosen.count == torch.get_num_threads() == 2
        assert torch.get_num_threads() == 4
        torch.set_num_threads(1)
        with module.torch_threads() as chosen:
            assert chosen == Threads(1, "torch.set_num_threads") and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
