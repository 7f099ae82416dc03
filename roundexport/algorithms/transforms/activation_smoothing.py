"""Smoothing: the channels of an input become more alike, so that 8-bit activations lose less, at no cost at run time.

Runtimes round the inputs of a linear to 8 bits: one scale per token, or per token and group of neighboring channels.
A scale follows the largest value, so one massive channel takes the precision of all that share it.  Every pair of
channel_scaling.py, producer -> consumers, gets one factor α per channel:

    m_w = max over calibration tokens of |x| in channel w of what the consumers read
    α_w = m_w^p / geometric mean of m^p              p = 1/4
    consumers' columns · α_w,   producer's rows / α_w

so consumers read x / α, and the float block computes what it did.  The larger p, the more alike are the channels, and
the less alike are the columns of the weights, which are rounded too: with p = 1/4 their rounding loses what it lost,
with p = 1/2, SmoothQuant's usual value, a seventh more (docs/decisions/0073).

In: a float block and its float inputs.  Out: the block with other weights, and the norms and biases that changed, for
the artifact's overrides.  Any rounding method can follow.  Nothing is trained: one pass over a few samples.
Limits: inputs that no pair feeds stay as they are: of lm_head, of blocks whose norms feed a residual too (BERT), of a
down_proj behind an activation alone (GELU); with a gate, up feeds it.  channel_scaling.py finds them.
Source: arXiv 2211.10438, whose s = m^a / (max |w|)^(1-a); the maxima of weights are left out here, since rounding
chooses its own grid per group.  The same folds before weights alone: arXiv 2306.00978.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from roundexport.algorithms.common.scaling_training import fold_in, useful
from roundexport.algorithms.interface import BlockInputs, BlockSize, BlockTransform, Transformed
from roundexport.calibration.evenly_spread import evenly_spread
from roundexport.errors import RoundexportError, UsageError
from roundexport.model.channel_scaling import Pair, find_pairs
from roundexport.model.hooks import hooks
from roundexport.quant.spec import QuantSpec

_PROBED_SAMPLES = 1  # used to detect pairs
_LEAST = 1e-4  # of the largest channel's m: what a channel that is silent on these tokens counts as


@dataclass(frozen=True)
class ActivationSmoothingSettings:
    """How much of the differences between channels is moved into the weights.

    Args:
        exponent: p; 0 changes nothing, 1 makes all channels reach equally far.
        samples: calibration samples whose tokens are looked at.
        batch_size: samples that go through the block at a time.

    Raises:
        UsageError: a value is out of range.
    """

    exponent: float = 0.25
    samples: int = 16
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.exponent <= 1:
            raise UsageError(f"exponent must be from 0 to 1, not {self.exponent}")
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")

    def forward_passes(self, samples: int) -> float:
        """Block forwards over one sample that a block takes."""
        return float(min(self.samples, samples))

    def rtn_equivalents(self) -> float:
        """Work on weights alone, in roundings of them to nearest."""
        return 1.0

    def peak_floats(self, size: BlockSize) -> float:
        """Float32 values held at most besides the block: its weights once more."""
        return float(size.weights)


def transform_block(
    block: nn.Module, inputs: BlockInputs, specs: Mapping[str, QuantSpec], settings: ActivationSmoothingSettings
) -> Transformed:
    """Fold the factors into a block.

    Args:
        block: the block with its float weights, on ``inputs.device``; changed in place to an equivalent one.
        inputs: hidden states; of them, the float model's.
        specs: scheme by the linear's name in the block; others stay float.
        settings: exponent and samples.

    Returns:
        What changed other than weights in ``specs``, and the factors of rows; empty where there are no pairs.

    Raises:
        RoundexportError: activations are not finite numbers.
    """
    pairs = useful(find_pairs(block, inputs.call, inputs.float_inputs[:_PROBED_SAMPLES].to(inputs.device)), specs)
    if not pairs:
        return Transformed()
    sizes = _largest(block, inputs, {next(iter(pair.consumers)) for pair in pairs}, settings)
    return fold_in(block, pairs, [settings.exponent * _logarithm(pair, sizes) for pair in pairs], specs)


def _largest(
    block: nn.Module, inputs: BlockInputs, names: set[str], settings: ActivationSmoothingSettings
) -> dict[str, Tensor]:
    """Largest magnitude per column of what each named linear reads [K], at the positions that count."""
    found: dict[str, Tensor] = {}

    def keep(name: str, chosen: Tensor) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            values = args[0].detach().float().abs()
            values = values[chosen] if values.shape[:-1] == chosen.shape else values.flatten(0, -2)
            largest = values.amax(0)
            found[name] = torch.maximum(found[name], largest) if name in found else largest

        return hook

    for part in torch.split(evenly_spread(len(inputs.float_inputs), settings.samples), settings.batch_size):
        counted = inputs.mask[part].to(inputs.device) > 0
        handles = (block.get_submodule(name).register_forward_pre_hook(keep(name, counted)) for name in sorted(names))
        with hooks(handles), torch.no_grad():
            inputs.call.run(block, inputs.float_inputs[part].to(inputs.device))
    return found


def _logarithm(pair: Pair, sizes: Mapping[str, Tensor]) -> Tensor:
    """Logarithm of m per channel of a pair [W], of mean 0; a key-value head's channel is read by several columns."""
    name, channels = next(iter(pair.consumers.items()))
    size = sizes[name]
    largest = size.new_zeros(pair.width).scatter_reduce_(0, channels.to(size.device), size, "amax")
    most = float(largest.max())
    if not most < float("inf"):  # NaN fails this too
        raise RoundexportError(f"{name}: activations that enter it are not finite numbers; the model is unusable")
    logarithm = largest.clamp(min=max(_LEAST * most, torch.finfo(torch.float32).tiny)).log()
    return logarithm - logarithm.mean()


def _samples(settings: ActivationSmoothingSettings) -> int:
    """See :class:`BlockTransform`."""
    return settings.samples


METHOD = BlockTransform(
    ActivationSmoothingSettings, transform_block, reads_target=False, reads_quantized=False, samples=_samples
)
