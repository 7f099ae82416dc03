"""Workers that Ray places: one dies, the store is full, and the bytes are those of a plain run."""

from __future__ import annotations

import os
import signal
from concurrent.futures import Future
from pathlib import Path

import pytest
from cluster_toys import shared
from tuning_tools import Models

from roundexport.cluster.messages import call, result
from roundexport.cluster.pool import about
from roundexport.errors import UsageError, WontFitError

ray = pytest.importorskip("ray")

from ray.exceptions import ActorDiedError, ObjectStoreFullError, OutOfDiskError  # noqa: E402

from roundexport.cluster.ray_actors import RayPool  # noqa: E402

STORE = 80 << 20  # bytes of Ray's object store; it takes no less
FULL = "Ray's object store is full, and no disk is left to spill to .* run the same command again to go on"


class Disturbed(RayPool):
    """Kills an actor's process in the middle of what it does, once; and once hands out what the store cannot hold."""

    sent = 0
    pid: int | None = None
    fills: int | None = None

    def submit(self, place: int, message: bytes) -> Future[bytes]:
        self.sent += 1
        if self.sent == self.fills:
            message = call(len, bytes(STORE))
        future = super().submit(place, message)
        if self.sent == 12 and self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
        return future


def test_a_cluster_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("first line\nnobody listens there")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UsageError, match=r"cannot be reached \(nobody listens there\); .*ray start --head"):
        RayPool("ray://head:10001", None)


class FullActor:
    """An actor whose call, or whose answer, the store cannot hold."""

    def __init__(self, here: BaseException | None, there: BaseException | None) -> None:
        self.answer, self.here, self.there = self, here, there

    def remote(self, message: bytes) -> FullActor:
        if self.here is not None:
            raise self.here
        return self

    def future(self) -> Future[bytes]:
        found: Future[bytes] = Future()
        found.set_exception(self.there)
        return found


@pytest.mark.parametrize("error", [ObjectStoreFullError("no room"), OutOfDiskError("no room"), ActorDiedError()])
@pytest.mark.parametrize("on_its_way_back", [False, True])
def test_a_full_store_is_told_and_a_death_stays_one(error: Exception, on_its_way_back: bool) -> None:
    pool = RayPool.__new__(RayPool)
    pool._actors = {0: FullActor(None, error) if on_its_way_back else FullActor(error, None)}
    future = pool.submit(0, b"")
    expected = type(error) if isinstance(error, ActorDiedError) else WontFitError
    with pytest.raises(expected, match=None if expected is not WontFitError else "store is full, .*go on"):
        future.result(timeout=5)
    assert not future.cancel()


def test_ray_workers_give_the_bytes_of_a_plain_run(
    models: Models, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")  # where the machine is busy
    # Nobody else's cluster, which auto would find; and its store has no disk to spill to.
    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=STORE,
        _system_config={"local_fs_capacity_threshold": 0.0},
    )  # fmt: skip
    try:
        with pytest.raises(WontFitError, match="no machine has 1 CPUs and 1e\\+06 GiB"):
            RayPool("auto", 1e6)
        pool = Disturbed("auto", 0.5)
        assert ray.cluster_resources()["CPU"] == 2 and ray.available_resources().get("CPU", 0) == 0
        assert pool.places == 2 and pool.describe() == "2 Ray workers, 1 CPU each"
        pool.pid = result(pool.submit(0, call(about)).result()).pid
        found = shared(models("llama, one block"), tmp_path / "shared", calibration_text, pool)
        assert result(pool.submit(0, call(about)).result()).pid != pool.pid, "nobody died"
        with pytest.raises(WontFitError, match=FULL):  # on its way back
            result(pool.submit(0, call(bytes, STORE)).result())
        pool.fills = pool.sent + 12
        with pytest.raises(WontFitError, match=FULL):
            shared(models("llama, one block"), tmp_path / "full", calibration_text, pool)
        assert result(pool.submit(0, call(len, b"after it")).result()) == 8, "a full store is for good"
        pool.close()
    finally:
        ray.shutdown()
    assert found == shared(models("llama, one block"), tmp_path / "full", calibration_text, None), "not gone on"
