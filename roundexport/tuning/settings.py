"""`TuneSettings`: everything that decides what tuning makes of a model, in one frozen value.

`tune` and `convert` take it, the command line builds it, the artifact's manifest and an interrupted run's state record
it.  What is None (or ``auto``) here is decided by the recipe (recipes.py), the method or the bit width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from roundexport.calibration.text import text_digest
from roundexport.errors import UsageError
from roundexport.quant.spec import QuantSpec, ScaleDtype
from roundexport.schemes.rules import read_rules
from roundexport.schemes.settings import BitSearchSettings, Cost, LinearScheme, SchemeSettings, Scoring

FILES = ("rules", "calibration")
"""Fields that may name files."""
Precision = Literal["auto", "float32", "bfloat16"]
_MOST_TOKENS = 10**9  # of calibration; hundreds of times what the largest published runs take
# Fields that a method may decide: how "not asked for" is written, and the value where no method has a say.
_METHOD_DECIDES: dict[str, tuple[Any, Any]] = {
    "scale_dtype": (None, "float16"),
    "embedding_bits": ("auto", 8),
    "everything": (None, False),
}


@dataclass(frozen=True)
class TuneSettings:
    """How to tune a model.

    Args:
        recipe: composition of methods, ``rtn``, ``light``, ``default`` or ``best``; see ``roundexport/recipes.py``.
        algorithm: rounding method, a file of ``roundexport/algorithms``; None: the recipe's.
        transform: equivalent transformation before rounding, as ``teq``, or ``none``; None: the recipe's.
        finish: tuning of the whole model after its blocks, or ``none``; None: the recipe's.
        bits: 2, 3, 4 or 8.
        group_size: weights along K that share a scale; None for whole rows.
        symmetric: zero point fixed; None: symmetric at 4 and 8 bits, asymmetric at 2 and 3.
        scale_dtype: dtype in which scales are stored; None: float16, or what the method needs.
        embedding_bits: 8 or 4 for token embedding and lm_head, rounded to nearest; None keeps them float; ``auto``: 8,
            or what the method needs.
        everything: also quantize the tables and linears outside the blocks, and round norms and biases to eight bits;
            None: not, unless the method needs it.
        rules: JSON file of exceptions by layer name, see ``roundexport/rules.py``.
        target_bits: mean bits per weight, scales and zero points counted, to keep to by choosing ``choices`` per layer;
            None: ``bits`` everywhere.
        choices: bit widths to choose from.
        tie: the same bits for layers that share an input (query, key and value; gate, up); with ``cost`` latency they
            have them as it is.
        scoring: how a layer's loss is predicted: ``fisher``, or ``delta_loss``, which is SignRoundV2's.
        cost: what the choice minimizes: ``bits``, or ``latency`` as measured on this machine.
        target_speedup: how many times faster one token's products with the blocks' linears are to be than with all of
            them at 4 bits, block 32, symmetric; with ``cost`` latency, in place of ``target_bits``.
        cost_target: whose kernels are timed: ``onnx`` or ``openvino``.
        calibration: ``self`` (sampled from the model), a text file, or a Hugging Face dataset id.
        num_samples: calibration samples.
        sample_len: tokens per sample.
        steps: tuning steps, per block or of the finish; None: the method's own number.
        method_settings: settings of methods that have no option of their own, as ``end_to_end.window=2``.
        batch_size: samples per step.
        seed: of everything random.
        device: where blocks are computed: cpu, cuda or xpu.
        precision: of the products in blocks while tuning: ``float32``, ``bfloat16``, or ``auto``: bfloat16 where the
            device has it in hardware.
        max_ram: GiB of memory to stay within; hidden states that do not fit go to a file.  None: as it comes.

    Raises:
        UsageError: a number is not positive, or a choice is unknown.
        SpecError: bits, group size or scale dtype are none that exist.
    """

    recipe: str = "default"
    algorithm: str | None = None
    transform: str | None = None
    finish: str | None = None
    bits: int = 4
    group_size: int | None = 128
    symmetric: bool | None = None
    scale_dtype: ScaleDtype | None = None
    embedding_bits: int | Literal["auto"] | None = "auto"
    everything: bool | None = None
    rules: str | None = None
    target_bits: float | None = None
    choices: tuple[int, ...] = (2, 4, 8)
    tie: bool = False
    scoring: Scoring = "fisher"
    cost: Cost = "bits"
    target_speedup: float | None = None
    cost_target: str = "onnx"
    calibration: str = "self"
    num_samples: int = 128
    sample_len: int = 512
    steps: int | None = None
    method_settings: tuple[str, ...] = ()
    batch_size: int = 8
    seed: int = 42
    device: str = "cpu"
    precision: Precision = "auto"
    max_ram: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_ram"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} must be above 0, not {value}")
        for name in ("max_ram", "target_bits", "target_speedup"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UsageError(f"{name} must be a finite number, not {value}")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed must be from 0 to 2**64 - 1, not {self.seed}")
        if self.num_samples * self.sample_len > _MOST_TOKENS:
            raise UsageError(
                f"num_samples {self.num_samples} of {self.sample_len} tokens exceed {_MOST_TOKENS:,} tokens in all"
            )
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise UsageError(f"precision must be auto, float32 or bfloat16, not {self.precision!r}")
        _ = self.schemes  # refuses what no scheme has

    @property
    def schemes(self) -> SchemeSettings:
        """What decides the scheme of every weight."""
        search = BitSearchSettings(
            self.target_bits, self.target_speedup, self.choices, self.tie, self.scoring, self.cost, self.cost_target,
            self.batch_size, self.seed,
        )  # fmt: skip
        plain = self._settled_values({})
        linears = LinearScheme(self.bits, self.group_size, self.symmetric, plain["scale_dtype"])
        return SchemeSettings(linears, plain["embedding_bits"], plain["everything"], self.rules, search)

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

        Raises:
            UsageError: a file cannot be read.
        """
        found = self.to_json()
        if self.rules is not None:
            found["rules"] = [dataclasses.asdict(rule) for rule in read_rules(self.rules)]
        if self.calibration != "self" and Path(self.calibration).is_file():
            found["calibration"] = text_digest(Path(self.calibration))
        return found

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object, with the usual value where the method may decide."""
        lists = {"choices": list(self.choices), "method_settings": list(self.method_settings)}
        return {**dataclasses.asdict(self.settled()), **lists}
