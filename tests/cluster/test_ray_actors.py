"""Workers that Ray places: one dies, the store is full, and the bytes are those of a plain run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from cluster_toys import shared
from tuning_tools import Models

from roundexport.cluster.messages import call, result
from roundexport.cluster.pool import about
from roundexport.errors import UsageError, WontFitError

ray = pytest.importorskip("ray")

from ray.exceptions import ActorDiedError, ObjectStoreFullError, OutOfDiskError  # noqa: E402

from roundexport.cluster import ray_actors  # noqa: E402
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


class FakeRay:
    """A cluster of two machines with four CPUs each, where so many CPUs are free."""

    exceptions = ray.exceptions

    def __init__(self, free: int, dies: bool = False) -> None:
        self.free, self.dies, self.started, self.killed, self.ended = free, dies, list[FakeRay.Actor](), 0, False

    class Actor:
        """Finds room or waits."""

        def __init__(self, placed: bool) -> None:
            self.ready, self.placed = self, placed

        def remote(self) -> FakeRay.Actor:
            return self

    def is_initialized(self) -> bool:
        return False

    def init(self, **_: object) -> None: ...

    def shutdown(self) -> None:
        self.ended = True

    def nodes(self) -> list[dict[str, object]]:
        return [{"Alive": True, "Resources": {"CPU": 4.0}}] * 2

    def available_resources(self) -> dict[str, float]:
        return {"CPU": self.free} if self.free else {}

    def remote(self, num_cpus: int) -> Callable[[type], FakeRay]:
        self.cpus = num_cpus
        return lambda _: SimpleNamespace(remote=self.start)  # type: ignore[return-value]

    def start(self, _: int) -> FakeRay.Actor:
        self.started.append(FakeRay.Actor((len(self.started) + 1) * self.cpus <= self.free))
        return self.started[-1]

    def wait(self, answers: list[FakeRay.Actor], **_: object) -> tuple[list[FakeRay.Actor], list[FakeRay.Actor]]:
        return [one for one in answers if one.placed], [one for one in answers if not one.placed]

    def get(self, answers: list[FakeRay.Actor]) -> None:
        if self.dies:
            raise ray.exceptions.RayError(
                "The actor died as it was created:\nModuleNotFoundError: No module named 'torch'"
            )

    def kill(self, _: FakeRay.Actor) -> None:
        self.killed += 1


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeRay]:
    """Makes a cluster that is not there."""

    def made(free: int, dies: bool = False) -> FakeRay:
        fake = FakeRay(free, dies)
        monkeypatch.setattr(ray_actors, "ray", fake)
        monkeypatch.setattr(ray_actors, "_SETTLE_S", 0.0)
        monkeypatch.delenv(ray_actors.VARIABLE, raising=False)
        return fake

    return made


def test_as_many_workers_as_have_room_beside_others(cluster: Callable[..., FakeRay]) -> None:
    fake = cluster(free=7)
    pool = RayPool("auto", None)
    assert (pool.places, len(fake.started), pool.describe()) == (1, 1, "1 Ray workers, 4 CPUs each")


def test_a_cluster_without_room_is_left_as_it_was(cluster: Callable[..., FakeRay]) -> None:
    fake = cluster(free=0)
    with pytest.raises(WontFitError, match="no worker of 4 CPUs got room in 120 s; something else runs there"):
        RayPool("auto", None)
    assert fake.ended and fake.killed == len(fake.started) == 1


def test_workers_that_cannot_begin_are_told(cluster: Callable[..., FakeRay]) -> None:
    fake = cluster(free=8, dies=True)
    with pytest.raises(UsageError, match=r"could not begin \(ModuleNotFoundError: No module named 'torch'\); every"):
        RayPool("auto", None)
    assert fake.ended and fake.killed == 2


def test_a_lost_machine_ends_the_run_where_no_other_has_room(cluster: Callable[..., FakeRay]) -> None:
    fake = cluster(free=8)
    pool = RayPool("auto", None)
    fake.free = 4  # all of which the other worker has
    with pytest.raises(WontFitError, match=r"a worker was lost, .* run the same command again, and it goes on"):
        pool.restart(0)
    fake.free = 16
    pool.restart(0)


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
