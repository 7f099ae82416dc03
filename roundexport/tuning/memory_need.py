"""What work that replays the float model holds at once (model/blockwise_backward.py): checked before a run draws text.

    kept       what enters every block, lm_head and the embedding's rows, the gradient in hidden states
    output     kept + logits of one sample, their logarithms, probabilities and gradients; rounded tables, where these
               are scored
    backward   kept + a block + what autograd keeps of it for a batch + what the work has of a block

Three kinds of work replay a model: measuring what errors of outputs cost (output_fisher.py), scoring layers for a plan
of bits (schemes/sensitivity.py), and scoring activations in eight bits (schemes/activation_loss.py).

In: the plan, the settings.  Out: nothing, or WontFitError.  Limits: rough; experts count as if all were read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from roundexport.algorithms.interface import BlockSize
from roundexport.calibration.evenly_spread import samples_for
from roundexport.environment.memory import MemoryLimit, Moment
from roundexport.model.positions import max_positions
from roundexport.schemes import activation_loss, allocate

from .checkpointing import Replay
from .disk_need import output_bytes
from .output_fisher import rows_of

if TYPE_CHECKING:
    from roundexport.schemes.layer_plan import Plan

    from .planned_run import PlannedRun
    from .settings import TuneSettings

_LOGITS = (
    5  # float32 values per logit of a sample: itself, its logarithm, its probability, and gradients of the first two
)
_KEPT_PER_OUTPUT = 4  # float32 values that autograd keeps per output of a linear and token
_SQUARES, _WEIGHTS = 6, 4  # sums of a block's inputs with their factors; a weight while it is rounded


@dataclass(frozen=True)
class Replays:
    """The work of a run that replays the model.

    Args:
        plan: of the run.
        settings: of the run.
        fisher_samples: from so many of 512 tokens is measured what errors of outputs cost; 0: it is not.
        length: tokens of a sample.
        vocabulary: rows of lm_head; 0 where there is none.
    """

    plan: Plan
    settings: TuneSettings
    fisher_samples: int
    length: int
    vocabulary: int

    def check(self, done: Collection[Replay] = ()) -> None:
        """Refuse work that does not fit.

        Args:
            done: work that an earlier run did.

        Raises:
            WontFitError: it does not fit in ``max_ram``.
        """
        limit = MemoryLimit(self.settings.max_ram)
        for work, called, size, of_block, advice in self._asked():
            if work not in done:
                limit.check(called, *self._moments(size, of_block, work), advice=advice)

    def _asked(self) -> Iterator[tuple[Replay, str, BlockSize, Moment, str]]:
        """Work, as the subject of a sentence; what it is done on; bytes that it has of a block; what helps."""
        if self.fisher_samples:
            size = self._size(samples_for(self.fisher_samples, self.length), self.length)
            sums: Moment = {"sums of a block": output_bytes(rows_of(self.plan)) / len(self.plan.stack.blocks)}
            advice = "measure on fewer samples (--method-settings gram.fisher_samples=8), or take --recipe default"
            yield "outputs", "measuring what errors of outputs cost", size, sums, advice
        if self.plan.bit_allocator is not None:
            size = self._size(allocate.SAMPLES, min(self.length, allocate.LENGTH))
            schemes = max(map(len, self.plan.bit_allocator.options.values()), default=0)
            errors: Moment = {
                f"errors of a block's weights in {schemes} schemes": 2 * schemes * size.weights,
                "rounding them": 4 * (_SQUARES * size.widest**2 + _WEIGHTS * size.weights),
            }
            advice = "give fewer --choices or --group-choices, or one scheme for all layers"
            yield "scores", "scoring layers for bits per layer", size, errors, advice
        if self.settings.activations:
            size = self._size(activation_loss.SAMPLES, min(self.length, activation_loss.LENGTH))
            inputs: Moment = {"rounded inputs": 4 * self._batch(size) * size.length * (2 * size.widest + size.outputs)}
            yield "activations", "measuring what activations in 8 bits cost", size, inputs, "leave --activations out"

    def _size(self, samples: int, length: int) -> BlockSize:
        return BlockSize.of(self.plan.stack.blocks[0], min(samples, self.settings.samples), length)

    def _batch(self, size: BlockSize) -> int:
        return min(self.settings.batch_size, size.samples)

    def _moments(self, size: BlockSize, of_block: Mapping[str, float], work: Replay) -> tuple[Moment, Moment]:
        tokens, blocks = size.samples * size.length, len(self.plan.stack.blocks)
        kept = {
            "what enters every block": 4 * (blocks + 1) * tokens * size.hidden,
            "lm_head and rows of the embedding": 4 * (self.vocabulary + tokens) * size.hidden,
            "a gradient": 4 * tokens * size.hidden,
        }
        output = {**kept, "logits of a sample": 4 * _LOGITS * size.length * self.vocabulary}
        if work == "scores" and self.plan.bit_allocator is not None and self.plan.bit_allocator.tables:
            output["lm_head and rows of the embedding, rounded"] = kept["lm_head and rows of the embedding"]
        graph = 4 * _KEPT_PER_OUTPUT * self._batch(size) * size.length * size.outputs
        return output, {**kept, "a block": 4 * size.weights, "its graph on a batch": graph, **of_block}


def check_planned(run: PlannedRun, done: Collection[Replay] = ()) -> None:
    """The same before there is a run.

    Args:
        run: as it is planned.
        done: work that an earlier run did.

    Raises:
        WontFitError: it does not fit in ``max_ram``.
    """
    settings = run.settings
    if run.fisher_samples or settings.chooses_bits or settings.activations:
        length = min(settings.sample_len, max_positions(run.checkpoint))
        Replays(run.plan, settings, run.fisher_samples, length, run.vocabulary).check(done)
