"""The search for a plan that keeps a KL: how measured rounds correct the next one, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from roundexport.conversion.kl_rounds import KlRounds, Round
from roundexport.errors import UsageError


def searched(begun: KlRounds, loses: Callable[[float], float], finest: float = 1e-9, coarsest: float = 1e9) -> KlRounds:
    """The search over a model that loses ``loses(scores)``, with plans from ``finest`` to ``coarsest`` scores."""
    while not begun.done():
        allowed = begun.next_allowed()
        predicted = min(max(0.999 * allowed, finest), coarsest)
        begun = dataclasses.replace(begun, rounds=(*begun.rounds, Round(allowed, predicted, loses(predicted))))
    return begun


@pytest.mark.parametrize(
    ("gain", "power", "floor"), [(0.1, 1.0, 0.0), (0.28, 0.8, 0.008), (1.5, 1.2, 0.03), (0.4, 1.6, 0.001)]
)
def test_rounds_come_to_a_tenth_below_the_target(gain: float, power: float, floor: float) -> None:
    found = searched(KlRounds(0.05, floor, 0.4), lambda scores: floor + gain * scores**power)
    assert 0.045 <= found.rounds[found.best()].kl <= 0.05 and len(found.rounds) <= 4


def test_a_floor_above_the_target_is_refused_with_the_figure() -> None:
    with pytest.raises(UsageError, match=r"0\.005 cannot be kept.* loses 0\.00810 already"):
        KlRounds(0.005, 0.0081, 0.4)


def test_the_cheapest_plan_is_good_whatever_little_it_loses() -> None:
    found = searched(KlRounds(0.5, 0.001, 0.4), lambda scores: 0.001 + 0.1 * scores, coarsest=0.3)
    assert len(found.rounds) == 1 and found.rounds[found.best()].kl < 0.1


def test_where_no_round_keeps_the_target_it_is_refused() -> None:
    found = searched(KlRounds(0.05, 0.04, 0.4), lambda scores: 0.04 + 3 * scores, finest=0.1)
    with pytest.raises(UsageError, match=r"not reached in 2 rounds, which lose 0\.34000, 0\.34000;"):
        found.best()


def test_a_round_just_above_the_target_is_second_choice() -> None:
    tried = tuple(Round(1.0, 1.0, kl) for kl in (0.052, 0.03, 0.07, 0.051, 0.04))
    assert KlRounds(0.05, 0.0, 0.4, tried).best() == 4
    assert KlRounds(0.05, 0.0, 0.4, tried[:1] + tried[2:4]).best() == 2
