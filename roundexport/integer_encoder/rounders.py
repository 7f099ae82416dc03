"""Where an integer encoder's weights come from.

FromArtifact      what tuning made: every linear, table, norm and bias (`tune --algorithm bct`, or gram or signround on
                  the same grid of powers of two with --everything); nothing is rounded again
ForIntegers       rounded here, in Gram space, for the integers that each linear will get:

    H = Σ x̂ᵀx̂      C = Σ x̂ᵀ(x - x̂)        x̂ from the integer encoder so far, x from the float model
    D = Σ x̂ᵀe       e = r - r̂               r is what the output is added to before a norm, if it is
    T = W + (C Wᵀ + D)ᵀ H⁻¹  is rounded for H      (algorithms/rounding/gram.py; held-out samples damp the repair)
    b̂ = b + mean(x Wᵀ + r - x̂ Ŵᵀ - r̂)              what is left of the mean goes into the bias

so the weights repair what eight-bit inputs and four-bit tables before them have changed, and output and down also what
runs past them: a BERT's norm follows the sum, so whatever is wrong with the sum is theirs to mend.

Tables are rounded in Gram space too, with a metric of what the model does with a row's error in H's place
(sensitivity.py), one after the other, each for what those before it have left.  Types take up the mean error of words;
positions that of words and of the first type, and the first position all of its token's, where that is always the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roundexport.algorithms.common import error_compensation
from roundexport.algorithms.common.error_compensation import InputSums
from roundexport.algorithms.rounding._gram_problem import Problem
from roundexport.algorithms.rounding._gram_weight import round_rows
from roundexport.algorithms.rounding.gram import GramSettings
from roundexport.errors import ArtifactError
from roundexport.formats.artifact import Artifact
from roundexport.kernels import gram
from roundexport.quant.int8_tensor import Int8Tensor
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

from . import sensitivity
from .calibrate import Stage
from .float_encoder import TABLES, FloatEncoder
from .table_schemes import POWERS, table_spec

_SHARE = error_compensation.mean_share  # encoders have no massive inputs
_DAMPING = 0.1  # linears' errors on other texts are 2 to 4 % less than with .3, and no less with .03


class FromArtifact:
    """Weights as an artifact has them.

    Args:
        artifact: of the same model, everything in it quantized, symmetric, on powers of two.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._vectors = artifact.vectors()

    def tables(self, encoder: FloatEncoder, ids: NDArray[np.int64]) -> Mapping[str, QuantizedLinear]:
        """The artifact's tables.

        Raises:
            ArtifactError: it lacks one.
        """
        for name in TABLES:
            if name not in self._artifact.names():
                raise ArtifactError(
                    f"{self._artifact.path}: has no {name!r}; tune with --everything (or --algorithm bct)"
                )
        return {name: self._artifact.linear(name) for name in TABLES}

    def stage(self, stage: Stage) -> Mapping[str, tuple[QuantizedLinear, Int8Tensor]]:
        """The artifact's weights and biases."""
        return {
            name: (self._artifact.linear(name), self.vector(f"{name}.bias", np.empty(0, np.float32)))
            for name in stage.weights
        }

    def vector(self, name: str, values: NDArray[np.float32]) -> Int8Tensor:
        """The artifact's vector.

        Raises:
            ArtifactError: it has none of this name.
        """
        if name not in self._vectors:
            raise ArtifactError(
                f"{self._artifact.path}: {name} is not in eight bits; tune with --everything (or --algorithm bct)"
            )
        return self._vectors[name]


@dataclass(frozen=True, eq=False)
class ForIntegers:
    """Weights rounded for what the integer encoder gives them.

    Args:
        spec: of linears; symmetric, on powers of two.
        table_spec: of embedding tables by rows and width.
        settings: of the rounding.
        table_damping: of the metric that tables are rounded for, a share of its mean diagonal.
    """

    spec: QuantSpec = POWERS
    table_spec: Callable[[int, int], QuantSpec] = table_spec
    settings: GramSettings = field(default_factory=lambda: GramSettings(damping=_DAMPING))
    table_damping: float = 0.1

    def tables(self, encoder: FloatEncoder, ids: NDArray[np.int64]) -> Mapping[str, QuantizedLinear]:
        """Tables rounded in Gram space for what the model does with a row's error."""
        metric = sensitivity.of_embeddings(encoder, ids)
        problem = Problem.of([InputSums(metric, torch.zeros_like(metric))], (), self.table_damping, share=_SHARE)
        floats = {name: encoder.weights[f"{name}.weight"] for name in TABLES}
        found: dict[str, QuantizedLinear] = {}

        def left_of(name: str, wanted: Tensor) -> Tensor:
            """Round a table; what it lacks of the rows that were wanted."""
            found[name] = self._rounded(name, wanted, self.table_spec(*wanted.shape), problem)
            return wanted - torch.from_numpy(found[name].dequantize())

        word, position, kind = TABLES
        words, first = left_of(word, floats[word]), ids[:, 0]
        mean = words[torch.from_numpy(ids[:, 1:].flatten())].mean(0) if ids.shape[1] > 1 else torch.zeros(())
        kinds = left_of(kind, floats[kind] + mean)
        wanted = floats[position] + kinds[0]
        if (first == first[0]).all():  # [CLS]
            wanted[0] += words[first[0]] - mean
        left_of(position, wanted)
        return found

    def vector(self, name: str, values: NDArray[np.float32]) -> Int8Tensor:
        """Nearest, eight bits."""
        return Int8Tensor.nearest(values)

    def stage(self, stage: Stage) -> Mapping[str, tuple[QuantizedLinear, Int8Tensor]]:
        """Weights rounded in Gram space, and biases that take up what is left of the mean."""
        problem = self._problem(stage)
        given, floats = (t.flatten(0, 1).mean(0) for t in (stage.given, stage.floats))
        found = {}
        for name, (weight, bias) in stage.weights.items():
            made = self._rounded(name, weight, self.spec, problem)
            left = weight @ floats - torch.from_numpy(made.dequantize()) @ given
            if stage.residual is not None:
                left += stage.residual.flatten(0, 1).mean(0)
            found[name] = made, Int8Tensor.nearest((bias + left).numpy())
        return found

    def _problem(self, stage: Stage) -> Problem:
        parts: dict[bool, gram.Sums] = {}
        lacks: dict[bool, Tensor] = {}
        weights = torch.ones(stage.given.shape[:2])
        for apart, part in error_compensation.shares(0, len(stage.given)):
            parts.setdefault(apart, gram.Sums(stage.given)).add(stage.given[part], stage.floats[part], weights[part])
            if stage.residual is not None:
                more = stage.given[part].flatten(0, 1).t() @ stage.residual[part].flatten(0, 1)
                lacks[apart] = lacks[apart] + more if apart in lacks else more
        sums = [InputSums(*parts[apart].totals(), lacks.get(apart)) for apart in sorted(parts)]
        matrices = [weight for weight, _ in stage.weights.values()]
        return Problem.of(sums, matrices, self.settings.damping, share=_SHARE)

    def _rounded(self, name: str, weight: Tensor, spec: QuantSpec, problem: Problem) -> QuantizedLinear:
        spec.groups(weight.shape[1], name)  # refused with the name
        rows = round_rows(weight, spec, problem.tensors(), self.settings.effort())
        return QuantizedLinear.from_unpacked(spec, rows.codes.numpy(), rows.scale.numpy())
