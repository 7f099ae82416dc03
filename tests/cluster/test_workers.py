"""Items handed to workers: their order, their homes, deaths, errors, and tensors in files."""

from __future__ import annotations

import errno
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster_toys import InlinePool

from roundexport.algorithms.parts import RoundedRows, row_parts, shards
from roundexport.cluster import opening
from roundexport.cluster.address import Address
from roundexport.cluster.messages import answer, call, result
from roundexport.cluster.spilling import spill
from roundexport.cluster.workers import Workers
from roundexport.errors import SpecError, UsageError, WontFitError
from roundexport.storage import safetensors_writer


def double(item: int) -> int:
    return 2 * item


def refuse(item: int) -> int:
    if item == 3:
        raise SpecError(f"item {item} fits nowhere")
    return item


@pytest.mark.parametrize("homes", [None, [16 * (number // 2) for number in range(9)]])
@pytest.mark.parametrize("places", [1, 2, 4])
def test_results_come_in_the_order_of_items(places: int, homes: list[int] | None) -> None:
    pool = InlinePool(places)
    assert list(Workers(pool).map(double, range(9), homes)) == [2 * number for number in range(9)]
    assert sum(pool.by_place) == 9 and all(pool.by_place), "a place had nothing to do"


def test_what_belongs_together_is_done_in_one_place() -> None:
    pool = InlinePool(2)
    list(Workers(pool).map(double, range(6), [0, 0, 16, 16, 32, 32]))
    assert pool.by_place == [4, 2]


def test_a_death_is_told_and_its_items_are_done_again() -> None:
    said: list[str] = []
    pool = InlinePool(2, lambda number: number in (1, 4))
    assert list(Workers(pool, said.append).map(double, range(7))) == [2 * number for number in range(7)]
    assert pool.restarts == 2 and len(said) == 2 and "another one takes its place" in said[0]


def test_what_kills_three_processes_is_given_up() -> None:
    with pytest.raises(WontFitError, match=r"3 workers died one after the other .* fewer workers"):
        list(Workers(InlinePool(1, lambda number: True)).map(double, range(2)))


def test_what_is_given_up_is_stood_in_for_where_the_others_go_on() -> None:
    pool = InlinePool(1, lambda number: number < 3)
    found = list(Workers(pool).map(double, range(3), given_up=lambda error: len(str(error))))
    assert found[0] > 100 and found[1:] == [2, 4] and pool.restarts == 3


def test_ctrl_c_does_not_wait_for_what_is_being_done(monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy(InlinePool):
        def submit(self, place: int, message: bytes) -> Future[bytes]:
            future: Future[bytes] = Future()
            future.set_running_or_notify_cancel()
            return future

    waited: list[int] = []

    def wait(running: Any, **_: Any) -> None:
        waited.append(len(running))
        raise KeyboardInterrupt

    monkeypatch.setattr("roundexport.cluster.workers.wait", wait)
    with pytest.raises(KeyboardInterrupt):
        list(Workers(Busy(1)).map(double, range(2)))
    assert waited in ([1], [1, 0]), "a conversion of hours would be waited for"


def test_workers_that_cannot_begin_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_pool", lambda *_: InlinePool(2, lambda number: True))
    with (
        pytest.raises(UsageError, match=r"ended as it began .* name fewer .*__main__"),
        opening.open_cluster("local:2"),
    ):
        pytest.fail("opened")


def test_an_error_of_a_function_is_raised_as_it_is() -> None:
    with pytest.raises(SpecError, match="item 3 fits nowhere") as caught:
        list(Workers(InlinePool(2)).map(refuse, range(6)))
    assert any("in refuse" in note for note in caught.value.__notes__), "where it happened is not told"


def test_messages_bring_tensors_as_they_are() -> None:
    rows = RoundedRows(torch.arange(6, dtype=torch.uint8).view(1, 6), torch.tensor([[0.5]]), torch.tensor([[2.0]]))
    back = result(answer(call(RoundedRows.joined, [rows, rows])))
    assert torch.equal(back.weight(), rows.weight().repeat(2, 1)) and back.target is None
    assert rows.weight().tolist() == [[-1.0, -0.5, 0.0, 0.5, 1.0, 1.5]]


def test_spilled_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    given = {
        "sums": torch.randn(5, 5).t(), "half": torch.randn(3).bfloat16(), "chosen": torch.tensor([[7]]),
        "codes": torch.tensor([255], dtype=torch.uint8),
    }  # fmt: skip
    shared = spill(tmp_path, "parts", given)
    assert all(torch.equal(tensor, given[name]) for name, tensor in shared.tensors().items())
    assert all(tensor.stride() == given[name].stride() for name, tensor in shared.tensors().items())  # for equal bits
    shared.tensors()["sums"].zero_()  # stays in this process
    taken = shared.take()
    assert taken.keys() == given.keys() and torch.equal(taken["sums"], given["sums"])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_writer, "reserve", full)
    with pytest.raises(WontFitError, match="the disk is full"):
        spill(tmp_path, "parts", {"sums": torch.zeros(2)})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("local:1", Address(1)), ("local:16", Address(16)), ("auto", Address(None, "auto")),
        ("ray://head", Address(None, "ray://head:10001")), ("ray://10.0.0.1:6000", Address(None, "ray://10.0.0.1:6000")),
    ],
)  # fmt: skip
def test_addresses(text: str, expected: Address) -> None:
    assert Address.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "local", "local:0", "local:-1", "local:9999", "Auto", "ray://", "ray://a:b", "ray://a/b"]
)
def test_other_addresses_are_refused_with_those_that_exist(text: str) -> None:
    with pytest.raises(UsageError, match=r"local:N .* auto .* ray://HOST:PORT"):
        Address.parse(text)


def test_parts_cover_everything_once() -> None:
    for rows in (1, 16, 511, 512, 513, 576, 1536, 14336):
        parts = row_parts(rows)
        assert [row for part in parts for row in part] == list(range(rows))
        assert all(len(part) <= 512 and part.start % 16 == 0 for part in parts)
    assert [list(shard) for shard in shards(20, 8)] == [list(range(16)), list(range(16, 20))]
    assert [len(shard) for shard in shards(40, 6)] == [18, 18, 4], "shards are whole batches"
    assert [len(shard) for shard in shards(600, 8)] == [40] * 15, "not more than 16 shards"
    assert shards(0, 8) == []
