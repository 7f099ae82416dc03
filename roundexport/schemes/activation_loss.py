"""How much the model loses where a runtime rounds the inputs of one layer to eight bits, in nats per token.

    a = max|x| / 127 over `block` neighbors of K,   x̂ = round(x / a) · a            (kernels/group_matmul.py)
    loss = ½·Σ_t (g_t · W (x_t - x̂_t))² / tokens        g = gradient of the surprise of a label drawn from the model

To second order, as sensitivity.py scores rounded weights, and for the same reason: losses of layers add up to the
model's KL.  SmolLM2-135M-Instruct, 8 samples of 256 tokens: they add up to .0063, where ONNX Runtime's accuracy_level 4
costs .007 on held-out text.  Few layers have most of it: outputs of a first block, whose massive channels share a block
with small ones, and the last block, whose errors nothing later can drown.

`block` is that of ONNX Runtime: the group of the layer's scheme, at most 256.  OpenVINO's dynamic quantization cuts
into groups of 32, its default, which are finer where a scheme has larger ones.  Limits: the model runs block by block
(blockwise_backward.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from roundexport.model.blocks import linears, weight_of
from roundexport.model.blockwise_backward import BackwardSettings, open_backward
from roundexport.model.streamed_model import StreamedModel
from roundexport.quant.spec import LinearInfo, QuantSpec

SAMPLES, LENGTH = 8, 256
_WIDEST = 256


@dataclass(frozen=True)
class ActivationLosses:
    """What activations in eight bits cost.

    Args:
        losses: nats per token by layer.
        sharing: layers that read the very same input, and of which runtimes make one product.
    """

    losses: dict[str, float]
    sharing: tuple[tuple[str, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; :meth:`from_json` reads it back."""
        return {"losses": self.losses, "sharing": [list(names) for names in self.sharing]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ActivationLosses:
        """Read what :meth:`to_json` wrote."""
        losses = {str(name): float(loss) for name, loss in data["losses"].items()}
        return cls(losses, tuple(tuple(map(str, names)) for names in data["sharing"]))


def measure(
    weights: StreamedModel,
    ids: Tensor,
    layers: Mapping[str, tuple[LinearInfo, QuantSpec]],
    settings: BackwardSettings,
    tell: Callable[[str], None] = lambda line: None,
) -> ActivationLosses:
    """What each layer loses by inputs in eight bits.

    Args:
        weights: the float model, a decoder.
        ids: calibration samples [n, S]; the first few are used.
        layers: layers that will be quantized, with their schemes, by module path.
        settings: batch size, seed, device.
        tell: called with a line of text.

    Raises:
        UnsupportedError: the model cannot be run block by block.
    """
    ids = ids[:SAMPLES, :LENGTH]
    tell(f"activations in 8 bits: what they cost {len(layers)} layers, on {len(ids)} samples of {ids.shape[1]} tokens")
    blocks = {name: _block(info, spec) for name, (info, spec) in layers.items()}
    sums: dict[str, float] = {}
    values: dict[str, Tensor] = {}

    def begin(block: nn.Module, prefix: str) -> None:
        values.clear()
        values.update({f"{prefix}.{name}": weight_of(module) for name, module in linears(block).items()})

    def seen(path: str, x: Tensor, gradient: Tensor) -> None:
        if path in blocks:
            error = (x - rounded(x, blocks[path])) @ values[path].float().t()
            sums[path] = sums.get(path, 0.0) + float((error * gradient).sum(1).square().sum()) / (2 * ids.numel())

    with open_backward(weights, ids, settings) as model, torch.no_grad():
        head = model.head_name
        tied = next((info.name for info, _ in layers.values() if head in info.shared_with), None)
        if head is not None and (head in blocks or tied is not None):
            blocks[head] = blocks[tied or head]
            model.head = head
        model.forward()
        if model.head is not None:
            values[model.head] = model.head_weight()
        model.backward(model.output_gradient(model.sampled_label_nll(), seen), seen, begin)
    sharing = tuple(names for names in model.sharing.values() if len(names) > 1)
    return ActivationLosses(dict(sorted(sums.items())), sharing)


def rounded(x: Tensor, block: int) -> Tensor:
    """Inputs [T, K] after rounding to 8 signed bits per ``block`` neighbors, the last block cut short where K ends."""
    width = x.shape[-1]
    padded = nn.functional.pad(x, (0, -width % block)).reshape(len(x), -1, block)
    step = padded.abs().amax(-1, keepdim=True) / 127
    return (torch.round(padded / torch.where(step == 0, 1.0, step)) * step).reshape(len(x), -1)[:, :width]


def _block(info: LinearInfo, spec: QuantSpec) -> int:
    return min(spec.group_width(info.in_features), _WIDEST)
