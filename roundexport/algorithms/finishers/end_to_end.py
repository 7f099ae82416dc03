"""End to end: codes, scales, norms and biases of the whole model trained together on the model's output.

A block-wise method minimizes the error of hidden states.  What counts is the next-token distribution, and a hidden
state's error says little about its effect there.  So the codes of the block-wise method become latent codes
(latent_codes.py), and a few hundred batches minimize

    loss = mean over positions that count of KL(float model ‖ quantized model)    encoders: squared error of the output
    latent codes u, scale factors d, norms and biases ← Adam      rates decay to 0

through the whole model, with straight-through rounding.  A few percent of the codes change.  The float model's last
hidden states are computed once, so a step costs a forward and a backward pass of the quantized model and two heads,
in bfloat16 where blocks are (model/head_products.py).
The few calibration samples would overfit.  A decoder therefore generates three more for each, at temperature 1; the
float model's distribution is a valid target on any text.

    windows    a model that is too large is tuned in windows of consecutive blocks.  The target of the last window is
               the model's output, as LFQ's for the last block; that of the others the hidden states after the window
    memory     eight copies of a window's weights; the logits of one sample at a time; the window's autograd graph where
               it is small, else gradient checkpointing block by block.  The largest window that fits is taken: in
               max_ram, else in the control group's limit, else in the machine

The start and the end are compared on the same samples, and the better is kept.  The state is saved every few minutes
(finisher_state.py); an interrupted run resumes from it and gives the same bytes.

In: an artifact tuned block by block, its float model.  Out: new integers on the same scheme, changed norms and biases.
Sources: EfficientQAT, arXiv 2407.11062 (scales end to end); LFQ, arXiv 2605.29756 (float logits for the last block).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace

from torch import Tensor

from roundexport.algorithms.finishing import FinishInputs, FinishResult
from roundexport.algorithms.interface import BlockSize, Finisher
from roundexport.calibration.self_generated import WRITING_BYTES
from roundexport.errors import UsageError
from roundexport.quant.quantized_linear import QuantizedLinear

from ._window import Window, WindowSettings, graph_values

_STEP_COST = 3.5  # a step in forwards of its batch: 3 with its backward pass, 4 with gradient checkpointing
_WEIGHT_COPIES = 8  # float weights; latent codes, their start, two moments, gradients; ŵ and its gradient
_LOGITS = 7  # tensors of the size of a sample's logits
_HEADS = 3  # float weights; their bfloat16, and that of their difference to the rounded ones
_WRITING_COST = 3.0  # a sample that is written token by token, in forwards of one
_PROGRAM_BYTES = 700 << 20


@dataclass(frozen=True)
class EndToEndSettings:
    """How long and how far.

    Args:
        steps: per window.
        batch_size: samples per step.
        window: blocks tuned together; None: all.
        written: samples that a decoder writes itself, per calibration sample.
        last: tune only so many blocks at the end; None: all.  1 with ``window`` 1 is LFQ.
        rate: first step of latent codes, in codes; 0 for scales alone; None: 1/100 at 2 bits, 1/140 at 3, else 1/200.
        scale_rate: Adam's first step of scale factors, norms and biases.
        vectors: tune norms and biases too.

    Raises:
        UsageError: a value is out of range.
    """

    steps: int = 200
    batch_size: int = 8
    window: int | None = None
    written: int = 3
    last: int | None = None
    rate: float | None = None
    scale_rate: float = 6e-3
    vectors: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "window", "last"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        if self.written < 0:
            raise UsageError(f"written must be at least 0, not {self.written}")
        for rate in (self.rate, self.scale_rate):
            if rate is not None and not 0 <= rate < 1:
                raise UsageError(f"rates must be at least 0 and below 1, not {rate}")

    def forward_passes(self, samples: int) -> float:
        """Block forwards over one sample that a block takes."""
        passes = 2 * (1 + self.written) + _WRITING_COST * self.written
        return _STEP_COST * self.steps * min(self.batch_size, samples) + passes * samples

    def rtn_equivalents(self) -> float:
        """Work on weights alone, in roundings of them to nearest."""
        return float(self.steps)

    def peak_floats(self, size: BlockSize) -> float:
        """Float32 values held at most: a window, what it is tuned with, hidden states, two heads, logits."""
        window = min(self.window or size.blocks, size.blocks)
        states = 4 * (1 + self.written) * size.samples * size.length * size.hidden
        head = size.vocabulary * (_HEADS * size.hidden + _LOGITS * size.length)
        graph = graph_values(size, self.batch_size, window)
        return _WEIGHT_COPIES * window * size.weights + states + head + graph

    def of_window(self) -> WindowSettings:
        """What a window needs to know."""
        return WindowSettings(self.steps, self.batch_size, self.rate, self.scale_rate, self.vectors)

    def fitted(self, size: BlockSize) -> EndToEndSettings:
        """The same with the largest window that fits in memory, and no generated samples where the model does not."""
        if self.window is not None or size.max_bytes is None:
            return self
        limit = size.max_bytes - _PROGRAM_BYTES
        writes = 4 * (size.blocks * size.weights + size.vocabulary * size.hidden) + WRITING_BYTES <= limit
        plain = replace(self, written=self.written if writes else 0)
        windows = (plain, *(replace(plain, window=blocks) for blocks in range(size.blocks - 1, 0, -1)))
        return next((found for found in windows if 4 * found.peak_floats(size) <= limit), replace(plain, window=1))


def finish(inputs: FinishInputs, settings: EndToEndSettings) -> FinishResult:
    """Tune a quantized model window by window, or as a whole.

    Args:
        inputs: the float model and what its blocks were quantized to.
        settings: how long and how far.

    Raises:
        RoundexportError: the loss is not a finite number.
    """
    count = len(inputs.weights.stack.blocks)
    size = settings.window or count
    quantized, floats = inputs.start, inputs.floats
    layers: dict[str, QuantizedLinear] = {}
    vectors: dict[str, Tensor] = {}
    losses = []
    for begin in range(0, count, size):
        blocks = range(begin, min(begin + size, count))
        with ExitStack() as held:
            for index in blocks:
                held.enter_context(inputs.weights.block(index, inputs.device))
            window = Window(inputs, settings.of_window(), blocks)
            floats = window.float_output(floats)
            if settings.last is None or blocks.stop > count - settings.last:
                losses.append(window.tune(quantized, floats))
            quantized = window.output(quantized) if blocks.stop < count else quantized
            layers.update(window.layers())
            vectors.update(window.vectors())
    return FinishResult(layers, vectors, tuple(losses))


METHOD = Finisher(EndToEndSettings, finish)
