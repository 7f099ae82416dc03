"""The knapsack against every plan there is, its bounds, its speed, and what it refuses."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roundexport.errors import UsageError
from roundexport.schemes.knapsack import Item, allocate, cheapest, reachable, tie

CHOICES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), min_size=1, max_size=4)
ITEMS = st.lists(CHOICES, min_size=1, max_size=5)


def items_of(table: list[list[tuple[int, int]]]) -> list[Item]:
    return [
        Item(f"layer {i}", tuple(float(loss) for loss, _ in row), tuple(cost for _, cost in row))
        for i, row in enumerate(table)
    ]


def total(items: list[Item], plan: tuple[int, ...]) -> tuple[float, int]:
    """What a plan loses and costs."""
    chosen = list(zip(items, plan, strict=True))
    return sum(item.losses[c] for item, c in chosen), sum(item.costs[c] for item, c in chosen)


def brute_force(items: list[Item], budget: int) -> tuple[float, int] | None:
    """The least (loss, cost) of all plans within the budget."""
    plans = itertools.product(*(range(len(item.costs)) for item in items))
    return min((found for found in (total(items, plan) for plan in plans) if found[1] <= budget), default=None)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(table=ITEMS, budget=st.integers(0, 60))
def test_no_plan_is_better(table: list[list[tuple[int, int]]], budget: int) -> None:
    items = items_of(table)
    best = brute_force(items, budget)
    if best is None:
        with pytest.raises(UsageError, match="can be reached"):
            allocate(items, budget)
        return
    assert total(items, allocate(items, budget)) == best


def test_losses_of_very_different_size_are_told_apart() -> None:
    items = [Item("a", (1e-9, 0.0), (0, 1)), Item("b", (2e-9, 0.0), (0, 1)), Item("c", (1e6, 5e5), (0, 5))]
    assert allocate(items, 6) == (0, 1, 1)


def test_a_plan_that_loses_nothing_is_found() -> None:
    items = [Item(str(i), (0.3, 0.01, 0.0), (2, 4, 8)) for i in range(14)]  # .3 and .01 are no sums of powers of two
    assert allocate(items, 14 * 8) == (2,) * 14


def test_a_whole_model_takes_a_second_and_keeps_its_budget() -> None:
    draw = random.Random(0)
    items = []
    for i in range(28 * 7):
        costs = sorted(draw.randrange(50_000, 2_000_000) for _ in range(4))  # hardly two sums are equal
        items.append(
            Item(str(i), tuple(draw.random() * 10 ** draw.randrange(-3, 1) / (c + 1) for c in range(4)), tuple(costs))
        )
    least, most = reachable(items)
    since = time.process_time()
    for share in (0.01, 0.3, 0.5, 0.9, 1.0):
        budget = int(least + share * (most - least))
        assert total(items, allocate(items, budget))[1] <= budget
    assert time.process_time() - since < 5


def test_an_impossible_budget_is_refused_with_the_range() -> None:
    items = [Item("a", (1.0, 0.0), (20, 40)), Item("b", (1.0, 0.0), (10, 80))]
    with pytest.raises(UsageError, match=r"2\.90 bits cannot be met; with these choices 3\.00 bits to 12\.00 bits"):
        allocate(items, 29, lambda cost: f"{cost / 10:.2f} bits")


def test_tied_layers_get_one_choice() -> None:
    items = {name: Item(name, losses, (2, 4)) for name, losses in
             {"q": (3.0, 0.0), "k": (1.0, 0.5), "o": (2.5, 0.0)}.items()}  # fmt: skip
    merged = tie(items, [("q", "k")])
    assert [(item.losses, item.costs, names) for item, names in merged] == [
        ((4.0, 0.5), (4, 8), ("q", "k")),
        ((2.5, 0.0), (2, 4), ("o",)),
    ]
    assert allocate([item for item, _ in merged], 10) == (1, 0)
    with pytest.raises(UsageError, match="tied twice"):
        tie(items, [("q", "k"), ("k", "o")])
    with pytest.raises(UsageError, match="different choices"):
        tie({**items, "k": Item("k", (1.0,), (2,))}, [("q", "k")])


@pytest.mark.parametrize(
    ("losses", "costs"), [((), ()), ((1.0,), (1, 2)), ((float("nan"),), (1,)), ((-1.0,), (1,)), ((1.0,), (-1,))]
)
def test_nonsense_is_refused_by_name(losses: tuple[float, ...], costs: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="layer 7"):
        Item("layer 7", losses, costs)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(table=ITEMS, most_loss=st.integers(0, 120))
def test_no_plan_that_loses_as_little_is_cheaper(table: list[list[tuple[int, int]]], most_loss: int) -> None:
    items = items_of(table)
    plans = [total(items, plan) for plan in itertools.product(*(range(len(item.costs)) for item in items))]
    allowed = [cost for loss, cost in plans if loss <= most_loss]
    loss, cost = total(items, cheapest(items, most_loss))
    if allowed:
        assert loss <= most_loss and cost == min(allowed)
    else:
        assert loss == min(loss for loss, _ in plans)
