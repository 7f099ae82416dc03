"""What the cache of an ONNX decoder costs: the tokens in it, and neither its slots nor its capacity."""

from __future__ import annotations

import errno
import mmap
import sys

import numpy as np
import psutil
import pytest

from roundexport.runtime.engines._ort_pages import Pages
from roundexport.runtime.engines._ort_slots import Slots
from roundexport.types import KvLayer

KV: list[KvLayer] = [{"layer": 0, "num_kv_heads": 2, "head_dim": 64}]
TOKEN = 2 * 2 * 64 * 4  # bytes: keys and values of two heads
ROWS, SHORT, LONG = 64, 20, 4000
SLACK = ROWS * 2 * 2 * 2 * mmap.PAGESIZE + 4 * 2**20  # two pages of each head of each row; and what Python does

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux alone")


def held() -> int:
    return psutil.Process().memory_info().rss


def fill(slots: Slots, slot: int, length: int, value: float) -> None:
    slots.reserve(length)
    for array in slots.cache.values():
        array[slot, :, slots.lengths[slot] : length] = value
    slots.lengths[slot] = length


@pytest.fixture
def many() -> tuple[Slots, int]:
    """Short rows and a long one, in a buffer that has grown since; and the memory that was held before."""
    before, slots = held(), Slots(KV, {}, 8192)
    slots.resize(ROWS, 256)
    for slot in range(ROWS - 1):
        fill(slots, slot, SHORT, slot + 1.0)
    fill(slots, ROWS - 1, LONG, 0.5)
    slots.resize(ROWS + 1, slots.capacity)
    return slots, before


def test_many_short_rows_beside_a_long_one_cost_their_tokens(many: tuple[Slots, int]) -> None:
    slots, before = many
    assert held() - before < TOKEN * (LONG + ROWS * SHORT) + SLACK  # slots x the longest row: 268 MB
    assert all((array[slot, :, :SHORT] == slot + 1.0).all() for array in slots.cache.values() for slot in range(5))
    assert all((array[ROWS - 1, :, :LONG] == 0.5).all() for array in slots.cache.values())


def test_what_a_long_row_leaves_behind_is_given_back(many: tuple[Slots, int]) -> None:
    slots, before = many
    for slot in range(ROWS - 1):  # it has been everywhere
        slots.exchange(slot, slot + 1 if slot else ROWS - 1)
    for slot in range(1, ROWS):
        fill(slots, slot, LONG, 0.25)
        slots.cut(slot, SHORT)
    assert held() - before < TOKEN * (LONG + ROWS * SHORT) + SLACK
    slots.move(3, ROWS)
    assert all((array[ROWS, :, SHORT - 1 : SHORT + 1] != 0).any() for array in slots.cache.values())
    assert np.array_equal(slots.cache["0.key"][3], np.zeros_like(slots.cache["0.key"][3]))
    assert held() - before < TOKEN * (LONG + ROWS * SHORT) + SLACK


def test_what_is_kept_of_a_row_that_was_cut_stays_as_it_was(many: tuple[Slots, int]) -> None:
    slots, _ = many
    for length in (1000, 999, 937, 17, 1):
        slots.cut(ROWS - 1, length)
        assert all((array[ROWS - 1, :, :length] == 0.5).all() for array in slots.cache.values())
        assert all((array[ROWS - 2, :, :SHORT] == ROWS - 1.0).all() for array in slots.cache.values())


def test_a_kernel_that_takes_no_advice_costs_memory_and_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """EINVAL where it was built without transparent huge pages, ENOSYS where without madvise."""

    class Deaf(mmap.mmap):
        def madvise(self, option: int, *where: int) -> None:
            raise OSError(errno.EINVAL if option == mmap.MADV_NOHUGEPAGE else errno.ENOSYS, "no")

    monkeypatch.setattr(mmap, "mmap", Deaf)
    pages = Pages((2, 1, 64, 64))
    pages.array[...] = 1.0
    pages.give_back(1, 0)
    pages.give_all_back()
    assert (pages.array[0] == pages.array[1]).all()
