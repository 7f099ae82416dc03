"""What decides the scheme of every weight, and how bits are spread over layers where that is asked for.

`TuneSettings` holds the same fields flat, as a person writes them, and hands these values to the code that plans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from roundexport import plugins
from roundexport.errors import UsageError
from roundexport.quant.spec import QuantSpec, ScaleDtype

Cost = Literal["bits", "latency"]
Scoring = Literal["fisher", "delta_loss"]
Rounding = Literal["nearest", "searched", "gram"]
_KL_GROUPS = (32, 64, 128)
TABLE_BITS = (4, 8)
"""Of token embedding and lm_head."""


def default_symmetric(bits: int) -> bool:
    """Whether codes of this width have a fixed zero point where nothing is said: accuracy at 2 and 3, speed above."""
    return bits in (4, 8)


@dataclass(frozen=True)
class LinearScheme:
    """Scheme of all layers that nothing else is said of.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: weights along K that share a scale; None for whole rows.
        symmetric: zero point fixed; None: symmetric at 4 and 8 bits, asymmetric at 2 and 3.
        scale_dtype: dtype of stored scales.

    Raises:
        SpecError: a value that no scheme has.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool | None = None
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        self.spec({})

    def spec(self, changes: Mapping[str, Any]) -> QuantSpec:
        """The scheme with some fields changed.

        Raises:
            SpecError: a value that no scheme has.
        """
        values = {**dataclasses.asdict(self), **changes}
        if values["symmetric"] is None:
            values["symmetric"] = default_symmetric(values["bits"])
        return QuantSpec(**values)


@dataclass(frozen=True)
class BitSearchSettings:
    """How bits are chosen per layer; one budget, in bits, in time, or in what the model may lose.

    Args:
        target_bits: mean bits per weight, scales and zero points counted, with ``cost`` bits.
        target_speedup: how many times faster one token's products with the blocks' linears are to be than with all of
            them at 4 bits, block 32, symmetric; with ``cost`` latency.
        target_kl: KL to the float model, nats per token, that is to be kept at the least ``cost``.
        kl_gain: with ``target_kl``, the model's KL over the sum of the layers' scores, which stand for rounding on a
            searched grid; a better method has less than 1.
        choices: bit widths to choose from.
        group_choices: group sizes to choose from, None among them for whole rows; None: the one asked for, and with
            ``target_kl`` 32, 64 and 128.
        tie: the same bits for layers that share an input; with ``cost`` latency they have them as it is.
        scoring: how a layer's loss is predicted.
        cost: what the choice minimizes.
        cost_target: whose kernels are timed.
        batch_size: samples per forward while layers are scored.
        seed: of the labels that scoring draws.
        rounding: of the weights that are scored, as near as can be to what they will get.
        tables: token embedding and lm_head are chosen for too, of 4 and 8 bits.

    Raises:
        UsageError: both budgets or none, no choices, or an unknown scoring, cost or target.
    """

    target_bits: float | None = None
    target_speedup: float | None = None
    target_kl: float | None = None
    kl_gain: float = 1.0
    choices: tuple[int, ...] = (2, 4, 8)
    group_choices: tuple[int | None, ...] | None = None
    tie: bool = False
    scoring: Scoring = "fisher"
    cost: Cost = "bits"
    cost_target: str = "onnx"
    batch_size: int = 8
    seed: int = 42
    rounding: Rounding = "gram"
    tables: bool = False

    def __post_init__(self) -> None:
        for name, known in (
            ("cost", get_args(Cost)),
            ("cost_target", plugins.names("targets")),
            ("scoring", get_args(Scoring)),
            ("rounding", get_args(Rounding)),
        ):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} must be {' or '.join(known)}, not {getattr(self, name)!r}")
        for name in ("target_bits", "target_speedup", "target_kl", "kl_gain"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} must be above 0, not {value}")
        if self.target_speedup is not None and self.cost != "latency":
            raise UsageError("target_speedup needs cost latency: give both")
        if self.cost == "latency" and self.target_speedup is None and self.target_kl is None:
            raise UsageError("cost latency needs target_speedup, as in 1.2, or target_kl, to keep it at most speed")
        if self.cost == "latency" and self.target_bits is not None:
            raise UsageError("target_bits and cost latency exclude each other: there is one budget, bits or time")
        if self.target_kl is not None and (self.target_bits is not None or self.target_speedup is not None):
            raise UsageError("target_kl excludes target_bits and target_speedup: there is one budget")
        if self.target_kl is not None and self.scoring != "fisher":
            raise UsageError(f"target_kl needs scores in nats, which scoring fisher gives and {self.scoring} does not")
        if self.tables and self.scoring != "fisher":
            raise UsageError(
                f"tables are measured in nats, which scoring fisher gives and {self.scoring} does not; leave scoring "
                f"{self.scoring} out, or take embedding_bits 8 or 4 in place of plan"
            )
        if not self.choices or self.group_choices == ():
            raise UsageError("choices must name at least one bit width, and group_choices one group size")

    @property
    def wanted(self) -> bool:
        """Whether there is a budget at all."""
        return any(budget is not None for budget in (self.target_bits, self.target_speedup, self.target_kl))

    def schemes(self, linears: LinearScheme) -> list[LinearScheme]:
        """Every combination of bits and group size that a layer can get."""
        usual = (linears.group_size,) if self.target_kl is None else _KL_GROUPS
        return [
            dataclasses.replace(linears, bits=bits, group_size=group)
            for bits in self.choices
            for group in self.group_choices or usual
        ]


@dataclass(frozen=True)
class SchemeSettings:
    """What decides the scheme of every weight.

    Args:
        linears: scheme of the linears in the blocks that no rule names.
        embedding_bits: 8 or 4 for token embedding and lm_head, until bits are chosen for them; None keeps them float.
        embedding_group_size: weights of a row of them that share a scale; None for whole rows, auto for that of
            ``linears``.
        everything: also the tables and linears outside the blocks, and norms and biases in eight bits.
        rules: JSON file of exceptions by layer name, see rules.py.
        search: how bits are chosen per layer, where they are.

    Raises:
        UsageError: bits of embeddings that do not exist.
        SpecError: a choice of bits or groups that no scheme has.
    """

    linears: LinearScheme = field(default_factory=LinearScheme)
    embedding_bits: int | None = 8
    embedding_group_size: int | Literal["auto"] | None = "auto"
    everything: bool = False
    rules: str | None = None
    search: BitSearchSettings = field(default_factory=BitSearchSettings)

    def __post_init__(self) -> None:
        if self.embedding_bits not in (None, *TABLE_BITS):
            raise UsageError(f"embedding_bits must be 8, 4 or none, not {self.embedding_bits!r}")
        _ = self.tables
        for scheme in self.search.schemes(self.linears):
            scheme.spec({})

    @property
    def has_tables(self) -> bool:
        """Whether anything outside the blocks is quantized."""
        return self.embedding_bits is not None or self.everything

    @property
    def tables(self) -> QuantSpec:
        """Scheme of token embedding and lm_head, and of what else is quantized outside the blocks."""
        own, linears = self.embedding_group_size, self.linears
        group_size = linears.group_size if own == "auto" else own
        return linears.spec({"bits": self.embedding_bits or 8, "group_size": group_size, "symmetric": True})
