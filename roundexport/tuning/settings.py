"""`TuneSettings`: everything that determines the result of tuning, in one frozen value.

`tune` and `convert` take it, the command line builds it, the artifact's manifest and an interrupted run's state record
it.  Fields that are None (or ``auto``) are decided by the recipe (recipes.py), the method or the bit width.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from roundexport.calibration.mixture import by_content, counts_of, parts_of
from roundexport.environment.memory import MemoryLimit
from roundexport.errors import UsageError
from roundexport.model.parts import check_part
from roundexport.quant.spec import QuantSpec, ScaleDtype
from roundexport.schemes.rules import read_rules
from roundexport.schemes.settings import BitSearchSettings, Cost, LinearScheme, Rounding, SchemeSettings, Scoring

from .recipes import RECIPES, check_recipe, resolve
from .setting_field import (
    auto_none_or_int,
    auto_or_group_sizes,
    auto_plan_none_or_int,
    documented,
    ints,
    none_or_int,
    setting,
    texts,
)

FILES = ("rules", "calibration")
"""Fields that may name files."""
Precision = Literal["auto", "float32", "bfloat16"]
_USUAL_GAIN = {"rtn": 1.2, "light": 0.8, "default": 0.6, "best": 0.5}  # of the KL that layers' scores foretell
_SCORED_BY: dict[str, Rounding] = {"rtn": "nearest", "optimal_rtn": "searched"}  # methods, and a recipe of one's name
_USUAL_SAMPLES, _SAMPLES = 128, {"light": 16}
_LEAST = {"steps": 1, "batch_size": 1, "num_samples": 1, "sample_len": 8, "seed": 0}
_MOST_TOKENS = 10**9  # of calibration; hundreds of times what the largest published runs take
# Fields that a method may decide: the value that means "not set", and the default where no method decides.
_METHOD_DECIDES: dict[str, tuple[Any, Any]] = {
    "scale_dtype": (None, "float16"),
    "embedding_bits": ("auto", 8),
    "everything": (None, False),
}
_BUDGETS = ("target_bits", "target_speedup", "target_kl")


_BUDGET: tuple[str, Callable[[TuneSettings], bool]] = (
    "target_bits, target_kl or target_speedup",
    lambda settings: settings.chooses_bits,
)
_ONLY_WITH: dict[str, tuple[str, Callable[[TuneSettings], bool]]] = {
    "choices": _BUDGET,
    "group_choices": _BUDGET,
    "tie": _BUDGET,
    "scoring": _BUDGET,
    "kl_gain": ("target_kl", lambda settings: settings.target_kl is not None),
    "cost_target": ("cost latency", lambda settings: settings.cost == "latency"),
}
"""Fields that do nothing without another one, which it is, and whether that is given."""


@documented
@dataclass(frozen=True)
class TuneSettings:
    """How to tune a model.

    Raises:
        UsageError: a number is not positive, or a choice is unknown.
        SpecError: bits, group size or scale dtype are none that exist.
    """

    recipe: str = setting(
        "default", "Composition of methods: rtn, light, default or best; of encoders as a whole: bct or w8a8."
    )
    algorithm: str | None = setting(None, "Rounding method in place of the recipe's; see: roundexport list algorithms.")
    transform: str | None = setting(
        None,
        "activation_smoothing, teq, teq_noise, teq_model (the whole model in memory), or none; in place of the "
        "recipe's.",
    )
    finish: str | None = setting(None, "Tuning of the whole model after its blocks, or none, in place of the recipe's.")
    bits: int = setting(4, "2, 3, 4 or 8.")
    group_size: int | None = setting(
        128, "Weights that share a scale: 16, 32, 64, 128, 256, or none (whole row).", none_or_int
    )
    symmetric: bool | None = setting(
        None, "Zero point fixed; default: symmetric at 4 and 8 bits, else asymmetric.",
        flags=("--symmetric/--asymmetric",),
    )  # fmt: skip
    scale_dtype: ScaleDtype | None = setting(
        None,
        "Dtype of stored scales: float16, float32, or exponent8 (powers of two); default: what the method needs, or "
        "float16.",
    )
    embedding_bits: int | Literal["auto", "plan"] | None = setting(
        "auto",
        "Bits of token embedding and lm_head: 8, 4, none (float), plan (8 or 4, chosen as layers' bits are, within the "
        "same target), or auto (8, or what the method needs).",
        auto_plan_none_or_int,
    )
    embedding_group_size: int | Literal["auto"] | None = setting(
        "auto",
        "Weights of embeddings and lm_head that share a scale, none (whole row), or auto (the group size).",
        auto_none_or_int,
    )
    everything: bool | None = setting(
        None, "Also tables and linears outside the blocks, and norms and biases in eight bits; default: the method's."
    )
    rules: str | None = setting(None, "JSON file of exceptions by layer name.")
    target_bits: float | None = setting(
        None,
        "Mean stored bits per weight (codes, scales, zero points as wide as a code) to keep to by choosing per layer.",
    )
    target_kl: float | None = setting(
        None,
        "KL to the float model, nats per token, to keep with as few bits as possible, or with cost latency as fast as "
        "possible, by choosing bits and groups per layer; convert measures and corrects, tune goes by prediction.",
    )
    kl_gain: float | None = setting(
        None,
        "With target KL: the model's KL over the predicted one, in place of what the recipe usually has; convert then "
        "does not correct.",
    )
    choices: tuple[int, ...] = setting((2, 4, 8), "Bit widths to choose from, comma-separated.", ints)
    group_choices: tuple[int | None, ...] | None = setting(
        None,
        "Group sizes to choose from with the bits, comma-separated, none for whole rows; auto: the group size, with "
        "target KL 32,64,128.",
        auto_or_group_sizes,
        unset="auto",
    )
    tie: bool = setting(False, "The same bits for layers that share an input: q, k, v; gate, up.")
    scoring: Scoring = setting("fisher", "How a layer's loss is predicted: fisher, or delta_loss (SignRoundV2's).")
    cost: Cost = setting("bits", "What the choice minimizes: bits, or latency as measured here.")
    target_speedup: float | None = setting(
        None,
        "With cost latency, in place of target bits or target KL: how much faster one token's products are to be than "
        "with 4 bits, block 32, everywhere, as in 1.2.",
    )
    cost_target: str = setting("onnx", "With cost latency: whose kernels are timed, onnx or openvino.")
    activations: bool = setting(
        False,
        "Of a decoder, also measure what activations in 8 bits cost each layer, so that an ONNX export keeps float32 "
        "ones where they cost most (see its activation time).",
    )
    calibration: str = setting(
        "auto",
        "auto (of a decoder half self, half a bundled text), self (sampled from the model), a text file, a .jsonl file "
        "(texts, or conversations for the chat template), a dataset id, or a mixture as a.txt:0.75,b.txt:0.25; of "
        "images, self (drawn) or a folder.",
    )
    num_samples: int | None = setting(
        None, "Calibration samples; default: 128, with recipe light 16; fewer where nothing looks at so many."
    )
    sample_len: int = setting(512, "Tokens per sample.")
    steps: int | None = setting(None, "Tuning steps, per block or of the finish, in place of the method's own number.")
    method_settings: tuple[str, ...] = setting(
        (),
        "Any setting of a method, comma-separated, as in gram.keep_size=false,end_to_end.window=2.",
        texts,
    )
    batch_size: int = setting(8, "Samples per step.")
    seed: int = setting(42, "Of everything random.")
    part: str | None = setting(
        None,
        "Of a folder that holds several models, the one that is taken: text or vision, in convert also all; default: "
        "said aloud.",
    )
    device: str = setting("cpu", "Where blocks are computed: cpu, cuda or xpu.")
    precision: Precision = setting(
        "auto", "Of products while tuning: float32, bfloat16, or auto (bfloat16 where the device has it)."
    )
    max_ram: float | None = setting(
        None,
        "GiB of memory to stay within; hidden states that do not fit wait in a file, and what cannot be done in pieces "
        "is refused before it begins.",
    )

    def __post_init__(self) -> None:
        MemoryLimit(self.max_ram)
        check_recipe(self.recipe)
        for name in ("algorithm", "transform", "finish", "rules", "calibration"):
            if getattr(self, name) == "":
                raise UsageError(f"{name} is an empty text; leave it out")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            left_open = value is None and getattr(TuneSettings, name) is None
            if not left_open and (type(value) is not int or value < least):
                raise UsageError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if not re.fullmatch(r"[a-z]+(:\d+)?", self.device):
            raise UsageError(f"device must be as cpu, cuda or xpu:1, not {self.device!r}")
        for name in ("target_bits", "target_speedup", "target_kl", "kl_gain"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and not number:
                raise UsageError(f"{name} must be a finite number, not {value!r}")
        if self.seed >= 2**64:
            raise UsageError(f"seed must be from 0 to 2**64 - 1, not {self.seed}")
        if self.samples * self.sample_len > _MOST_TOKENS:
            raise UsageError(
                f"num_samples {self.samples} of {self.sample_len} tokens exceed {_MOST_TOKENS:,} tokens in all"
            )
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise UsageError(f"precision must be auto, float32 or bfloat16, not {self.precision!r}")
        check_part(self.part)
        counts_of(parts_of(self.calibration), self.samples)  # refuses shares that cannot be kept
        _ = self.schemes  # refuses what no scheme has
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        """Refuse what was asked for and would change nothing."""
        for name, (wanted, is_given) in _ONLY_WITH.items():
            if getattr(self, name) != getattr(TuneSettings, name) and not is_given(self):
                raise UsageError(
                    f"{name} {getattr(self, name)} does nothing without {wanted}: give that too, or neither"
                )
        if self.embedding_group_size != "auto" and not self.schemes.has_tables:
            raise UsageError(
                f"embedding_group_size {self.embedding_group_size} does nothing where embedding_bits is none: leave it "
                "out"
            )
        if self.chooses_bits and self.bits != TuneSettings.bits:
            raise UsageError(
                f"bits {self.bits} does nothing where bits are chosen per layer: give choices {self.bits} to keep to "
                "it, or leave it out"
            )
        if self.embedding_bits == "plan" and not self.chooses_bits:
            raise UsageError(
                f"embedding_bits plan does nothing without {_BUDGET[0]}: give that too, or 8, 4 or none bits"
            )
        if self.target_kl is not None and self.group_choices is None and self.group_size != TuneSettings.group_size:
            raise UsageError(
                f"target_kl chooses group sizes per layer, so group_size {self.group_size} would be that of tables "
                f"alone; give group_choices {self.group_size} to keep to it, or embedding_group_size {self.group_size} "
                "if tables are meant"
            )

    def without_budget(self) -> TuneSettings:
        """The same with one scheme for all layers."""
        idle = [*_BUDGETS, *_ONLY_WITH, "cost", *(["embedding_bits"] if self.embedding_bits == "plan" else [])]
        return dataclasses.replace(self, **{name: getattr(TuneSettings, name) for name in idle})

    @property
    def samples(self) -> int:
        """Calibration samples, as asked for or as the recipe has them."""
        return _SAMPLES.get(self.recipe, _USUAL_SAMPLES) if self.num_samples is None else self.num_samples

    @property
    def usual_gain(self) -> float:
        """A model's KL over the sum of its layers' scores, as the recipe usually has it."""
        own = self.recipe in RECIPES and self.algorithm in (None, RECIPES[self.recipe].algorithm)
        return _USUAL_GAIN.get(self.recipe, 1.0) if own else 1.0

    @property
    def schemes(self) -> SchemeSettings:
        """What decides the scheme of every weight."""
        gain = self.kl_gain if self.kl_gain is not None else self.usual_gain
        search = BitSearchSettings(
            self.target_bits, self.target_speedup, self.target_kl, gain, self.choices, self.group_choices, self.tie,
            self.scoring, self.cost, self.cost_target, self.batch_size, self.seed,
            _SCORED_BY.get(self.algorithm or self.recipe, "gram"), tables=self.embedding_bits == "plan",
        )  # fmt: skip
        plain = self._settled_values({})
        table_bits = 8 if self.embedding_bits == "plan" else plain["embedding_bits"]  # until they are chosen
        linears = LinearScheme(self.bits, self.group_size, self.symmetric, plain["scale_dtype"])
        return SchemeSettings(linears, table_bits, self.embedding_group_size, plain["everything"], self.rules, search)

    def settled(self, needed: Mapping[str, Any] | None = None, method: str = "") -> TuneSettings:
        """These settings with a value wherever the method was left to decide.

        Args:
            needed: fields that the method needs at one value only (its SchemeNeeds).
            method: its name, for the error.

        Raises:
            UsageError: something else was asked for than the method needs.
        """
        for name, wanted in (needed or {}).items():
            asked = getattr(self, name)
            if asked not in (_METHOD_DECIDES[name][0], wanted):
                raise UsageError(
                    f"algorithm {method} needs {name} {wanted}, but {name} {asked} was asked for; "
                    "leave one of the two out"
                )
        return dataclasses.replace(self, **self._settled_values(needed or {}))

    def _settled_values(self, needed: Mapping[str, Any]) -> dict[str, Any]:
        values = {}
        for name, (unset, usual) in _METHOD_DECIDES.items():
            asked = getattr(self, name)
            values[name] = needed.get(name, usual) if asked == unset else asked
        return values

    def spec(self) -> QuantSpec:
        """Scheme of the blocks' linears that no rule names."""
        return self.schemes.linears.spec({})

    @property
    def chooses_bits(self) -> bool:
        """Whether bits are chosen per layer."""
        return self.schemes.search.wanted

    def by_content(self) -> dict[str, Any]:
        """The fields as a JSON object, files by what is in them: a changed file is another request.

        What a recipe stands for is in it too, as another version may compose it otherwise.
        How much memory may be taken does not decide what is asked for, so an interrupted run goes on with more of it.
        (Where a finisher's window depends on it, that is in the tuning run's own key.)

        Raises:
            UsageError: a file cannot be read.
        """
        found = {**self.to_json(), "max_ram": None, "num_samples": self.samples}
        if self.recipe in RECIPES:
            found["methods"] = resolve(self).to_json()
        if self.rules is not None:
            found["rules"] = [dataclasses.asdict(rule) for rule in read_rules(self.rules)]
        return {**found, "calibration": by_content(self.calibration)}

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object, with the usual value where the method may decide."""
        names = ("choices", "group_choices", "method_settings")
        lists = {name: list(value) for name in names if (value := getattr(self, name)) is not None}
        return {**dataclasses.asdict(self.settled()), **lists}
