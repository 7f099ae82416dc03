"""Mixed precision: every layer gets the bits that the model's loss, or its speed, is best served with.

    options   per layer, its scheme at each of ``choices``; one only where a rule settles the bits     (rules.py)
    score     what the model loses by each                                                        (sensitivity.py)
    cost      bits:     stored bits, scales and zero points counted; the budget is ``target_bits`` per weight
              latency:  nanoseconds of one token's product on this machine (kernel_timing.py); the budget is the time of
                        all layers at 4 bits, block 32, symmetric, which vendors' builders ship, over ``target_speedup``
    plan      the least sum of scores within the budget                                             (knapsack.py)
              loss:     with ``target_kl``, the least cost, bits or time, whose scores add up to no more than
                        target_kl / kl_gain

Where the target makes one product of layers that share an input and a scheme (query, key and value; gate and up), they
are tied when latency is the cost, and the product of all of them is what is timed; when bits are, ``tie`` asks for it,
and ``target_kl`` does by itself.
Linears in the blocks count, and with `embedding_bits` plan token embedding and lm_head, at 4 or 8 bits
(table_scores.py); where they share a weight they are one.  Looking a row up takes no time, attention and norms take
theirs besides.

Scores are taken on the first 24 samples, cut to 256 tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from roundexport.environment.versions import library_versions
from roundexport.model.blockwise_backward import BackwardSettings
from roundexport.model.streamed_model import StreamedModel
from roundexport.quant.spec import LinearInfo, QuantSpec

from . import sensitivity
from .kept_scores import scores_once
from .kernel_timing import Bench, Product, kernel_times, merged
from .knapsack import Item, allocate, cheapest, tie
from .rules import Decision, fitting
from .settings import BitSearchSettings
from .table_scores import Tables

SAMPLES, LENGTH = 24, 256
BASELINE = QuantSpec(4, 32, True)


@dataclass(frozen=True)
class Row:
    """One layer of a plan, or layers that were tied.

    Args:
        layers: module paths.
        spec: the scheme they get.
        score: what it is estimated to cost the model, nats per token for a decoder.
        cost: bits stored, or nanoseconds.
    """

    layers: tuple[str, ...]
    spec: QuantSpec
    score: float
    cost: int


@dataclass(frozen=True)
class BitAllocation:
    """A plan of schemes.

    Args:
        rows: in the model's order.
        unit: of the costs, ``bits`` or ``ns``.
        budget: most that the costs may add up to.
    """

    rows: tuple[Row, ...]
    unit: str
    budget: int

    def specs(self) -> dict[str, QuantSpec]:
        """Scheme by module path."""
        return {layer: row.spec for row in self.rows for layer in row.layers}

    def table(self) -> list[dict[str, Any]]:
        """The plan as rows to print."""
        return [
            {"layer": " + ".join(row.layers), "scheme": row.spec.describe(), "score": row.score, self.unit: row.cost}
            for row in self.rows
        ]

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON object; :meth:`from_json` reads it back."""
        rows = [
            {"layers": list(row.layers), "spec": row.spec.to_json(), "score": row.score, "cost": row.cost}
            for row in self.rows
        ]
        return {"rows": rows, "unit": self.unit, "budget": self.budget}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BitAllocation:
        """Read what :meth:`to_json` wrote."""
        rows = (
            Row(tuple(row["layers"]), QuantSpec.from_json(row["spec"]), row["score"], row["cost"])
            for row in data["rows"]
        )
        return cls(tuple(rows), data["unit"], data["budget"])


@dataclass(frozen=True, eq=False)
class BitAllocator:
    """What can be chosen from.

    Args:
        infos: what is chosen for, by module path: linears in the blocks that are quantized, then tables.
        options: their schemes, as many for every layer as there are choices, or one.
        settings: target, cost, and what scores are taken with.
        tables: names of token embedding and lm_head, where they are chosen for.
    """

    infos: dict[str, LinearInfo]
    options: dict[str, tuple[QuantSpec, ...]]
    settings: BitSearchSettings
    tables: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        decisions: Sequence[Sequence[Decision]],
        settings: BitSearchSettings,
        tables: Sequence[tuple[LinearInfo, Sequence[QuantSpec]]] = (),
    ) -> BitAllocator:
        """Options from one row of decisions per choice (see :func:`roundexport.schemes.rules.decide`).

        Args:
            decisions: one row per choice.
            settings: target, cost, and what scores are taken with.
            tables: token embedding and lm_head with their schemes, where they are chosen for.

        Raises:
            UsageError: a target in bits that cannot be reached.
        """
        infos, options = {}, {}
        for column in zip(*decisions, strict=True):
            specs = tuple(dict.fromkeys(decision.spec for decision in column if decision.spec is not None))
            if specs:
                infos[column[0].info.name], options[column[0].info.name] = column[0].info, specs
        for info, choices in tables:
            infos[info.name], options[info.name] = info, tuple(dict.fromkeys(choices))
        allocator = cls(infos, options, settings, tuple(info.name for info, _ in tables))
        if settings.target_bits is not None:  # refused before any work
            allocator._plan(dict.fromkeys(options, ()), allocator._bits(), ())
        return allocator

    def choose(
        self,
        weights: StreamedModel,
        ids: Tensor,
        device: torch.device,
        tell: Callable[[str], None] = lambda line: None,
        fits_head: bool = False,
    ) -> BitAllocation:
        """Score the options and make the plan.

        Args:
            weights: the float model.
            ids: calibration samples [n, S].
            device: where to compute.
            tell: called with a line of text now and then.
            fits_head: few bits of the table that lm_head reads will be rounded for what enters it.

        Raises:
            UsageError: the budget cannot be met; the text gives the reachable range.
        """
        ids = ids[:SAMPLES, :LENGTH]
        tell(f"scoring {len(self.options)} layers on {len(ids)} samples of {ids.shape[1]} tokens")
        settings = BackwardSettings(min(self.settings.batch_size, len(ids)), self.settings.seed, device)
        tables = self._tables(fits_head)
        layers = {name: specs for name, specs in self.options.items() if name not in self.tables}
        scores = scores_once(
            lambda: {**self._asked(weights, ids, settings), **({"fits_head": fits_head} if tables else {})},
            lambda: sensitivity.score(
                weights, ids, layers, self.settings.scoring, settings, self.settings.rounding, tables
            ),
        )
        groups = [names for names in map(self._alike, scores.sharing) if len(names) > 1]
        in_bits, target = self.settings.cost == "bits", self.settings.target_kl
        costs = self._bits() if in_bits else self._nanoseconds(groups, tell)
        tied = self.settings.tie or not in_bits or target is not None
        plan = self._plan(scores.losses, costs, groups if tied else ())
        for row in plan.rows:
            if row.layers[0] in self.tables:
                names = " and ".join((*row.layers, *self.infos[row.layers[0]].shared_with))
                tell(f"{names}: {row.spec.describe()}, expected to lose {row.score:.5f} by itself")
        if target is not None:
            tell(self._foretold(plan, costs, target))
        return plan

    def _tables(self, fitted: bool) -> Tables | None:
        if not self.tables:
            return None
        infos = tuple(self.infos[name] for name in self.tables)
        return Tables(infos, {name: self.options[name] for name in self.tables}, fitted)

    def _asked(self, weights: StreamedModel, ids: Tensor, settings: BackwardSettings) -> dict[str, Any]:
        """All that decides the scores."""
        return {
            "model": weights.checkpoint.digest,
            "bfloat16": weights.bfloat16,
            "ids": hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest(),
            "options": {name: [spec.to_json() for spec in specs] for name, specs in self.options.items()},
            "scoring": [
                self.settings.scoring,
                self.settings.rounding,
                settings.batch_size,
                settings.seed,
                settings.device.type,
            ],
            "constants": sensitivity.constants(),
            "versions": library_versions(),
        }

    def _foretold(self, plan: BitAllocation, costs: _Costs, target: float) -> str:
        """What a plan for a KL is expected to lose, in words."""
        loss = self.settings.kl_gain * sum(row.score for row in plan.rows)
        missed = f", and no plan with these choices {target:g}" if loss > target else ""
        return f"a plan of {costs.show(plan.budget)} is expected to lose {loss:.5f} nats per token{missed}"

    def _alike(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Of layers that share an input, those that have the options of the first."""
        known = [name for name in names if name in self.options]
        return tuple(name for name in known if self.options[name] == self.options[known[0]])

    def _bits(self) -> _Costs:
        weights = sum(info.in_features * info.out_features for info in self.infos.values())
        costs = {
            name: tuple(spec.storage_bits(info.out_features, info.in_features) for spec in self.options[name])
            for name, info in self.infos.items()
        }
        budget = int((self.settings.target_bits or 0) * weights)
        return _Costs("bits", costs, budget, lambda cost: f"{cost / weights:.3f} bits per weight")

    def _nanoseconds(self, groups: Sequence[tuple[str, ...]], tell: Callable[[str], None]) -> _Costs:
        target = self.settings.cost_target
        looked_up = [name for name in self.tables if _is_looked_up(self.infos[name])]
        multiplied = [name for name in self.infos if name not in looked_up]
        alone = [(name,) for name in multiplied if not any(name in names for names in groups)]
        together = [*groups, *alone] if merged(target) else [(name,) for name in multiplied]
        products: dict[tuple[str, ...], list[Product]] = {}
        for names in together:
            rows, width = sum(self.infos[name].out_features for name in names), self.infos[names[0]].in_features
            specs = (fitting(BASELINE, width)[0], *self.options[names[0]])
            products[names] = [Product(rows, width, spec) for spec in specs]
        times = kernel_times((p for found in products.values() for p in found), Bench(target), tell)
        base = sum(times[found[0]] for found in products.values())
        costs: dict[str, tuple[int, ...]] = {name: (0,) * len(self.options[name]) for name in looked_up}
        for names, found in products.items():
            # The whole time of a product is booked on its first layer: they are tied.
            costs[names[0]] = tuple(times[product] for product in found[1:])
            costs.update({name: (0,) * len(self.options[name]) for name in names[1:]})
        budget = int(base / (self.settings.target_speedup or 1))
        return _Costs("ns", costs, budget, lambda cost: f"{base / cost:.2f} times the speed of {BASELINE.describe()}")

    def _plan(
        self, losses: Mapping[str, tuple[float, ...]], costs: _Costs, groups: Sequence[tuple[str, ...]]
    ) -> BitAllocation:
        items = {
            name: Item(name, losses[name] or (0.0,) * len(specs), costs.by_layer[name])
            for name, specs in self.options.items()
        }
        merged_items = tie(items, groups)
        together = [item for item, _ in merged_items]
        if self.settings.target_kl is None:
            chosen, budget = allocate(together, costs.budget, costs.show), costs.budget
        else:
            chosen = cheapest(together, self.settings.target_kl / self.settings.kl_gain)
            budget = sum(item.costs[choice] for item, choice in zip(together, chosen, strict=True))
        rows = (
            Row(names, self.options[names[0]][choice], item.losses[choice], item.costs[choice])
            for (item, names), choice in zip(merged_items, chosen, strict=True)
        )
        return BitAllocation(tuple(rows), costs.unit, budget)


def _is_looked_up(table: LinearInfo) -> bool:
    """Whether only rows are taken from a table, and nothing is multiplied with it."""
    return table.kind == "embedding" and not table.shared_with


@dataclass(frozen=True)
class _Costs:
    """Costs of the options by layer, and the budget they share."""

    unit: str
    by_layer: dict[str, tuple[int, ...]]
    budget: int
    show: Callable[[int], str]
