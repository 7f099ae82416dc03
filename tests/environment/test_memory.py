"""``--max-ram``: a verb that holds weights refuses what does not fit before it begins, and stays within what does."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from warm_python import WarmPython

import roundexport
from conftest import build_model
from roundexport import TuneSettings
from roundexport.conversion import encoder_recipes
from roundexport.environment import memory
from roundexport.environment.memory import GIB, MemoryLimit
from roundexport.errors import UsageError, WontFitError
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.weight_bytes import WeightBytes
from roundexport.progress import Progress
from roundexport.targets.w8a8 import export_w8a8
from roundexport.targets.w8a8_control import Allowance

Models = Callable[[str], Path]
Packages = Callable[[str, str], tuple[Path, Path]]
SMALL = 0.001  # GiB; less than any process holds


def test_what_is_held_at_once_is_told_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: None)
    limit = MemoryLimit(4)
    limit.check("nothing", {}, advice="none")
    with pytest.raises(
        WontFitError, match=r"^the work takes about .* GiB of memory \((.*)\); max_ram is 4; "
    ) as caught:
        limit.check("the work", {"a little": GIB}, {"one": 3 * GIB, "another": 2 * GIB}, advice="have more")
    text = str(caught.value)
    assert "one 3.00, another 2.00, this process so far" in text and "a little" not in text
    assert float(re.findall(r"about ([\d.]+) GiB", text)[0]) > 5 and text.endswith("; have more")
    assert limit.bytes == 4 * GIB and MemoryLimit().bytes is None
    MemoryLimit().check("the work", {"everything": 1e30}, advice="none")


def test_without_one_it_is_that_of_the_control_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: 4 * GIB)
    monkeypatch.setattr(memory, "memory_free", lambda: 64 * GIB)
    monkeypatch.setattr(memory, "_held", lambda: GIB // 2)  # what this process holds depends on the tests before
    assert MemoryLimit().bytes == 4 * GIB
    assert (MemoryLimit().left(), MemoryLimit(5).left()) == (7 * GIB // 2, 9 * GIB // 2)
    MemoryLimit().check("the work", {"a little": GIB}, advice="have more")
    with pytest.raises(
        WontFitError, match=r"; control groups give this process 4\.00, and --max-ram sets another limit; "
    ):
        MemoryLimit().check("the work", {"much": 4 * GIB}, advice="have more")
    MemoryLimit(64).check("the work", {"much": 4 * GIB}, advice="have more")


@pytest.mark.parametrize(
    ("gib", "message"), [(0, "above 0"), (-1, "above 0"), (float("nan"), "finite"), (float("inf"), "finite")]
)
def test_a_limit_is_a_positive_number(gib: float, message: str) -> None:
    with pytest.raises(UsageError, match=f"max_ram must be .*{message}"):
        MemoryLimit(gib)
    with pytest.raises(UsageError, match=f"max_ram must be .*{message}"):
        TuneSettings(max_ram=gib)


def test_weights_are_counted_once(models: Models) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    model = checkpoint.load_model()
    found = WeightBytes.of(checkpoint)
    assert found.whole == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert found.largest == 4 * max(parameter.numel() for parameter in model.parameters())
    block = 4 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert block <= found.block < 1.01 * block + 4 * model.config.hidden_size


def test_experts_are_counted_one_at_a_time(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(build_model("mixtral", tmp_path))
    found = WeightBytes.of(checkpoint)
    expert = 4 * 3 * 64 * 128
    assert found.block > 4 * expert and found.step == found.block - 3 * expert


VERBS: dict[str, Callable[[Path, Path, Path, Path], Any]] = {
    "an export": lambda model, artifact, package, out: roundexport.export(artifact, out, max_ram=SMALL),
    "a verification": lambda model, artifact, package, out: roundexport.verify(package, against=model, max_ram=SMALL),
    "rewriting": lambda model, artifact, package, out: roundexport.rewrite(
        package / "model.onnx", artifact, out, max_ram=SMALL
    ),
    "a conversion": lambda model, artifact, package, out: roundexport.convert(
        model, out, TuneSettings(recipe="rtn", group_size=32, max_ram=SMALL), progress=False
    ),
    "calibration self": lambda model, artifact, package, out: roundexport.tune(
        model, out, TuneSettings(group_size=32, max_ram=SMALL), progress=False
    ),
}


@pytest.mark.parametrize("work", VERBS)
def test_what_does_not_fit_is_refused_before_it_begins(
    work: str, models: Models, packages: Packages, tmp_path: Path
) -> None:
    artifact, package = packages("llama", "onnx")
    with pytest.raises(WontFitError, match=rf"^{work}.* takes about \d\.\d\d GiB of memory .*max_ram is 0.001; "):
        VERBS[work](models("llama"), artifact, package, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_recipes_for_encoders_stay_within_it(models: Models, calibration_text: Path, tmp_path: Path) -> None:
    model, asked = models("bert"), {"calibration": str(calibration_text), "num_samples": 2, "sample_len": 16}
    bct = TuneSettings(recipe="bct", max_ram=SMALL, **asked)
    with pytest.raises(WontFitError, match=r"^recipe bct takes about .* max_ram is 0.001; "):
        roundexport.tune(model, tmp_path / "bct", bct, progress=False)
    w8a8 = TuneSettings(recipe="w8a8", **asked)
    encoder_recipes.make_artifact(Checkpoint.open(model), tmp_path / "artifact", w8a8, Progress(enabled=False))
    with pytest.raises(WontFitError, match=r"^the target's own tool takes about .* max_ram is 0.001; "):
        export_w8a8(
            tmp_path / "artifact", tmp_path / "out", Allowance(np.zeros((1, 16), np.int64)), to="onnx", model=model,
            progress=Progress(enabled=False), max_ram=SMALL,
        )  # fmt: skip


LIMITED = """
import resource, sys
import psutil
from roundexport import TuneSettings
from roundexport.conversion.convert import convert
from roundexport.environment.memory import GIB
from roundexport.verification.verify import verify
model, text, package, out = sys.argv[1:5]
room = 0.5
data = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) << 10
resource.setrlimit(resource.RLIMIT_DATA, (data + int(room * GIB),) * 2)
max_ram = psutil.Process().memory_info().rss / GIB + room
settings = TuneSettings(calibration=text, num_samples=2, sample_len=16, group_size=32, max_ram=max_ram)
convert(model, out, settings, to="openvino", progress=False)
verify(package, against=model, num_samples=2, sample_len=16, max_ram=max_ram, progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 < max_ram)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit a process's data")
def test_what_fits_stays_within_the_limit_that_the_system_enforces(
    models: Models, packages: Packages, calibration_text: Path, tmp_path: Path, warm: WarmPython
) -> None:
    _, package = packages("llama", "onnx")
    done = warm.run(LIMITED, models("llama"), calibration_text, package, tmp_path / "out")
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr[-3000:]


GROUPED = """
import sys
open(sys.argv[1] + "/cgroup.procs", "w").write("0")
from roundexport.environment.control_groups import memory_free, memory_limit
from roundexport.environment.memory import GIB, MemoryLimit
print(memory_limit(), 0 < memory_free() < memory_limit(), MemoryLimit().bytes)
held = bytes(int(MemoryLimit().left() * 0.9))
MemoryLimit().check("as much again", {"it": len(held)}, advice="do not")
"""


@pytest.fixture
def own_group() -> Iterator[Path]:
    """A control group of version 2 that may hold 1 GiB."""
    own = next((line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line[:3] == "0::"), "")
    folder = Path(f"/sys/fs/cgroup{own.rstrip('/')}/roundexport-{os.getpid()}")
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"a control group cannot be made here: {error}")
    try:
        if not (folder / "memory.max").exists():
            pytest.skip(f"control groups below {folder.parent} do not limit memory")
        (folder / "memory.max").write_text(str(GIB))
        yield folder
    finally:
        folder.rmdir()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no control groups")
def test_a_control_group_is_the_limit_that_nobody_named(own_group: Path, warm: WarmPython) -> None:
    done = warm.run(GROUPED, own_group)
    assert done.stdout == f"{GIB} True {GIB}\n"
    assert "control groups give this process 1.00" in done.stderr and done.returncode == 1


@pytest.mark.parametrize("gib", [None, 1 << 20])
def test_who_cannot_swap_asks_for_the_machines_memory_too(gib: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roundexport.environment.memory.memory_limit", lambda: None)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=2 << 30))
    limit, work = MemoryLimit(gib), {"weights": 3.0 * 2**30}
    limit.check("an export", work, advice="")
    with pytest.raises(WontFitError, match=r"an export takes .*weights 3\.00.*; this machine has 2\.00; take less"):
        limit.check("an export", work, advice="take less", or_machine=True)
