"""Which plan keeps a KL: a model's measured losses correct what layers' scores foretell.

    plan      least cost, bits or time, whose scores add up to `predicted` ≤ target / gain     (schemes/allocate.py)
    measured  KL of the package = floor + a · predictedᵇ        floor: the KL of the most accurate scheme everywhere
    next      predicted that gives AIM · target, by b = 1 after one round, by the two nearest rounds after more

Scores add up, and are in nats, but they stand for another rounding than the recipe's, and to second order; one factor
makes up for most of that and its dependence on the size of the loss for the rest.  The floor is measured first, with
round-to-nearest in minutes: what embeddings and the runtime's activations cost, no plan of the blocks can save.

A round is good whose KL lies from LEAST to 1 times the target.  Where no round is, the best one is taken that exceeds
the target by no more than a tenth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from roundexport.errors import UsageError

ROUNDS = 4
AIM, LEAST, MOST = 0.95, 0.9, 1.1  # of the target
_CHEAPEST = 0.97  # of the scores allowed: a plan that takes less has nothing cheaper to choose


@dataclass(frozen=True)
class Round:
    """One plan that was tuned and measured.

    Args:
        allowed: what its scores were allowed to add up to.
        predicted: what they add up to.
        kl: what its package loses, nats per token.
    """

    allowed: float
    predicted: float
    kl: float


@dataclass(frozen=True)
class KlRounds:
    """The search for a plan.

    Args:
        target: KL that is to be kept.
        floor: KL of the package whose layers all have the most accurate of the schemes.
        usual_gain: KL over scores, as the recipe usually has it.
        rounds: what was measured.
        earlier: how many of them were made for another target, and do not count as tries of this one.

    Raises:
        UsageError: the floor is above the target.
    """

    target: float
    floor: float
    usual_gain: float
    rounds: tuple[Round, ...] = ()
    earlier: int = 0

    def __post_init__(self) -> None:
        if self.floor >= self.target:
            raise UsageError(
                f"target_kl {self.target:g} cannot be kept: with the most accurate of the schemes to choose from in "
                f"every layer the package loses {self.floor:.5f} already, by its embeddings and by activations in 8 "
                "bits; ask for more, give wider --choices or smaller --group-choices, or --embedding-bits none"
            )

    def next_allowed(self) -> float:
        """What the scores of the next plan may add up to."""
        wanted = AIM * self.target - self.floor
        if wanted <= 0:  # the floor is nearly all of it
            return (self.target - self.floor) / 2 / self.usual_gain
        if not self.rounds:
            return wanted / self.usual_gain
        nearest, *others = sorted(self.rounds, key=lambda tried: abs(math.log(self._own(tried) / wanted)))
        power = self._power(nearest, others[0]) if others else 1.0
        return float(nearest.predicted * (wanted / self._own(nearest)) ** (1 / power))

    def done(self) -> bool:
        """Whether nothing is left to try."""
        if any(self._good(tried) for tried in self.rounds):
            return True
        plans = [tried.predicted for tried in self.rounds]
        tries = len(plans) - self.earlier
        return tries > 0 and (plans[-1] in plans[:-1] or tries == ROUNDS)

    def best(self) -> int:
        """Which round to take.

        Raises:
            UsageError: none of them keeps the target.
        """
        kept = [index for index, tried in enumerate(self.rounds) if tried.kl <= MOST * self.target]
        if not kept:
            found = ", ".join(f"{tried.kl:.5f}" for tried in self.rounds)
            raise UsageError(
                f"target_kl {self.target:g} was not reached in {len(self.rounds)} rounds, which lose {found}; "
                "ask for more in the same folder, which goes on with them, or take a better recipe in another"
            )
        return min(
            kept, key=lambda index: (self.rounds[index].kl > self.target, abs(self.rounds[index].kl - self.target))
        )

    def _good(self, tried: Round) -> bool:
        nothing_cheaper = tried.predicted < _CHEAPEST * tried.allowed
        return tried.kl <= self.target and (tried.kl >= LEAST * self.target or nothing_cheaper)

    def _own(self, tried: Round) -> float:
        """What the plan adds to the floor; a little at least, for both are measured with an error."""
        return max(tried.kl - self.floor, 0.02 * tried.kl)

    def _power(self, one: Round, other: Round) -> float:
        if one.predicted == other.predicted or self._own(one) == self._own(other):
            return 1.0
        power = math.log(self._own(one) / self._own(other)) / math.log(one.predicted / other.predicted)
        return min(2.0, max(0.5, power))


def told(rounds: Sequence[Round]) -> str:
    """The last round in words."""
    last = rounds[-1]
    return f"round {len(rounds)}: scores add up to {last.predicted:.5f}, the package loses {last.kl:.5f} nats per token"
