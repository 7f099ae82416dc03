"""A run whose workers see no folder together, but an object store: the same bytes, and nothing is left there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cluster_toys import InlinePool, shared
from tuning_tools import Models

from roundexport.algorithms.rounding import _gram_problem
from roundexport.cluster import block_parts, stores
from roundexport.cluster.address import Address
from roundexport.cluster.opening import Cluster
from roundexport.errors import CheckpointError, RoundexportError, UsageError
from roundexport.kernels import cholesky
from roundexport.tuning.hidden_states import Hidden

fsspec = pytest.importorskip("fsspec")

URL = "memory://spilled/run"


@pytest.fixture
def memory() -> Iterator[Any]:
    """An empty store in memory."""
    found = fsspec.filesystem("memory")
    found.mkdirs("/spilled/run", exist_ok=True)
    yield found
    found.rm("/spilled", recursive=True)


class ElsewherePool(InlinePool):
    """Places that see no file of the run."""

    def submit(self, place: int, message: bytes) -> Any:
        with pytest.MonkeyPatch.context() as elsewhere:
            seen = Hidden.open
            elsewhere.setattr(block_parts.Hidden, "open", lambda path: seen(_foreign(path)))
            return super().submit(place, message)


def _foreign(path: Path) -> Path:
    assert ".partial" not in str(path), "a worker looked into the run's folder"
    return path


def test_the_bytes_are_those_of_a_plain_run(
    memory: Any, models: Models, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_gram_problem, "_WIDE", 1)  # so that problems are solved in parts too
    monkeypatch.setattr(cholesky, "_COLUMNS", 32)
    model, asked = models("llama"), (calibration_text,)
    expected = shared(model, tmp_path / "plain", *asked, None)
    pool = ElsewherePool(2, lambda number: number == 9)
    assert shared(model, tmp_path / "store", *asked, pool, URL) == expected
    assert all(pool.by_place) and pool.restarts == 1
    assert not memory.find("/spilled"), "something is left in the store"
    (tmp_path / "mounted").mkdir()
    (tmp_path / "mounted" / "theirs").touch()
    one = models("llama, one block")
    found = shared(one, tmp_path / "file", *asked, ElsewherePool(1), (tmp_path / "mounted").as_uri())
    assert found == shared(one, tmp_path / "plain one", *asked, None)
    assert [path.name for path in (tmp_path / "mounted").iterdir()] == ["theirs"]


def test_a_store_that_breaks_is_told_and_the_run_goes_on(
    memory: Any, models: Models, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = models("llama, one block"), tmp_path / "out"
    with monkeypatch.context() as full, pytest.raises(RoundexportError, match=r"refuses \(no room\).* same command"):
        full.setattr(type(memory), "put_file", _refuse)
        shared(model, out, calibration_text, InlinePool(2), URL)
    found = shared(model, out, calibration_text, InlinePool(2), URL)
    assert found == shared(model, tmp_path / "plain", calibration_text, None)


def _refuse(*_: object, **__: object) -> None:
    raise OSError("no room")


def test_tensors_come_back_and_few_copies_are_kept(memory: Any) -> None:
    given = {"sums": torch.randn(3, 5), "codes": torch.arange(7, dtype=torch.uint8), "half": torch.ones(2).bfloat16()}
    found = [stores.store_tensors(URL, "parts", given) for _ in range(6)]
    assert len(memory.find("/spilled")) == 6
    for one in found:
        assert all(torch.equal(one.tensors()[name], tensor) for name, tensor in given.items())
    assert found[-1].tensors() is found[-1].tensors() and len(stores._copies._mapped) == stores._KEPT
    for one in found:
        assert set(one.take()) == set(given)
    assert not memory.find("/spilled") and not stores._copies._mapped
    found[0].release()  # twice is once
    with pytest.raises(FileNotFoundError):
        found[0].tensors()


@pytest.mark.parametrize(
    ("text", "where"),
    [("local:2@s3://bucket/a", (2, "")), ("auto@file:///mnt/a", (None, "auto")),
     ("ray://head@gs://b/c", (None, "ray://head:10001"))],
)  # fmt: skip
def test_a_store_follows_the_workers(text: str, where: tuple[int | None, str]) -> None:
    found = Address.parse(text)
    assert (found.local, found.ray) == where and found.store == text.partition("@")[2]
    assert Address.parse(text.partition("@")[0]).store is None


@pytest.mark.parametrize("url", ["", "/a/folder", "unheard-of://a/b", "file:///proc/nothing/here"])
def test_a_place_that_takes_nothing_is_refused_before_the_run(url: str) -> None:
    with pytest.raises(UsageError, match=r"is not the URL of a store|pip install|nothing can be written there"):
        stores.check_store(url)


def test_two_runs_do_not_meet_in_a_store(tmp_path: Path) -> None:
    cluster, task = Cluster(SimpleNamespace(), URL), SimpleNamespace(index=0)  # type: ignore[arg-type]
    makers: list[Callable[..., Any]] = [cluster.parts(tmp_path / name, "model") for name in ("a", "b", "a")]
    places = [make(task, None, 1)._place.store for make in makers]
    assert places[0] == places[2] != places[1] and all(place.startswith(f"{URL}/roundexport-") for place in places)


def test_a_worker_fetches_a_model_that_it_does_not_see(
    memory: Any, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUNDEXPORT_CACHE", str(tmp_path / "cache of the driver"))
    memory.put(f"{models('llama')}/", "/spilled/model/", recursive=True)
    url = "memory://spilled/model"
    seen = block_parts.Checkpoint.open(url, progress=False).folder
    task: Any = SimpleNamespace(model=tmp_path / "not mounted" / seen.name, part=None)
    monkeypatch.setenv("ROUNDEXPORT_CACHE", str(tmp_path / "cache of the worker"))
    assert tmp_path / "cache of the worker" in block_parts._Here()._checkpoint(task, url).folder.parents
    task.model = tmp_path / "not mounted" / "of another day"
    with pytest.raises(CheckpointError, match="is not what it was when the run began"):
        block_parts._Here()._checkpoint(task, url)
