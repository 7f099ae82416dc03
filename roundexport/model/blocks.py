"""Blocks: a model's repeated layers, found without any per-model code, and the weights in them.

The largest nn.ModuleList whose items are of one class, or of classes of the model's own file that all hold linears, is
the stack of blocks; the weights to quantize are the nn.Linear and Conv1D modules in it (Conv1D, GPT-2's, stores the
transpose).  block_call.py runs them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from roundexport.errors import UnsupportedError


@dataclass(frozen=True, eq=False)
class Stack:
    """The blocks of a model.

    Args:
        name: module path of the list, as in ``model.layers``.
        blocks: the blocks, in order.
    """

    name: str
    blocks: tuple[nn.Module, ...]

    def block_name(self, index: int) -> str:
        """Module path of one block, as in ``model.layers.3``."""
        return f"{self.name}.{index}"


def find_stack(model: nn.Module) -> Stack:
    """The model's blocks.

    Raises:
        UnsupportedError: no list of layers, of one class or file, that hold linear weights.
    """
    best, most = None, 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not _alike(module):
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if size > most and any(linears(item) for item in module):
            best, most = Stack(name, tuple(module)), size
    if best is None:
        raise UnsupportedError(
            f"{type(model).__name__}: no blocks found; they must be an nn.ModuleList of layers of one class or file"
        )
    return best


def _alike(items: nn.ModuleList) -> bool:
    """Whether these may be blocks: of one class, or layers of several kinds (OLMo-Hybrid) of one modeling file."""
    kinds = {type(item) for item in items}
    if len(kinds) < 2:
        return len(kinds) == 1
    files = {kind.__module__ for kind in kinds}
    return len(files) == 1 and not files.pop().startswith("torch.") and all(linears(item) for item in items)


def linears(module: nn.Module) -> dict[str, nn.Module]:
    """Modules with a weight matrix to quantize, by name in ``module``, in the model's order."""
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear | Conv1D)}


def weight_of(linear: nn.Module) -> Tensor:
    """The weight as a matrix [N, K]: a view of the parameter, so that it can be written to."""
    weight = linear.get_parameter("weight").detach()
    return weight.t() if isinstance(linear, Conv1D) else weight
