"""Blocks: a model's repeated layers, found without any per-model code, and the weights in them.

The largest nn.ModuleList whose items are of one class, or of classes of the model's own file that all hold linears,
holds the blocks; the weights to quantize are the nn.Linear and Conv1D modules in it (Conv1D, GPT-2's, stores the
transpose).  block_call.py runs them.  A model of several parts that run one after the other, as an encoder and a
decoder do, has one such list in each; its blocks are counted through.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from roundexport.errors import UnsupportedError

from .main_input import token_table


@dataclass(frozen=True)
class Part:
    """Blocks that follow each other, in one list of the model.

    Args:
        name: module path of the list, as in ``model.layers``.
        start: number of its first block among all.
        stop: one past that of its last.
    """

    name: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Stack:
    """The blocks of a model.

    Args:
        parts: the lists that they are in, in the order in which they run; one but for models of several parts.
        blocks: the blocks of all of them.
    """

    parts: tuple[Part, ...]
    blocks: tuple[nn.Module, ...]

    def part_of(self, index: int) -> Part:
        """The part that a block is in."""
        return next(part for part in self.parts if index < part.stop)

    def block_name(self, index: int) -> str:
        """Module path of one block, as in ``model.layers.3``."""
        part = self.part_of(index)
        return f"{part.name}.{index - part.start}"

    def holds(self, name: str) -> bool:
        """Whether a module or parameter of this path is in a block."""
        return any(name.startswith(f"{part.name}.") for part in self.parts)


def find_stack(model: nn.Module) -> Stack:
    """The model's blocks.

    Raises:
        UnsupportedError: no list of layers, of one class or file, that hold linear weights.
    """
    names = {id(module): name for name, module in model.named_modules()}
    parts: list[Part] = []
    blocks: list[nn.Module] = []
    for part in halves_of(model) or (model,):
        found = _largest_list(part)
        parts.append(Part(names[id(found)], len(blocks), len(blocks) + len(found)))
        blocks += found
    return Stack(tuple(parts), tuple(blocks))


def halves_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """Encoder and decoder of a model that has both; none of another."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return ()
    return model.get_encoder(), model.get_decoder()  # type: ignore[operator]


def _largest_list(model: nn.Module) -> nn.ModuleList:
    best, most = None, 0
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or not _alike(module):
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if size > most and any(linears(item) for item in module):
            best, most = module, size
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


def tied_modules(model: nn.Module) -> list[tuple[str, ...]]:
    """Names of modules that own the same weight, embeddings and linears, for each weight that an embedding owns."""
    owners: dict[int, list[str]] = {}
    embeddings = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.Linear):
            owners.setdefault(id(module.weight), []).append(name)
            if isinstance(module, nn.Embedding):
                embeddings.add(id(module.weight))
    return [tuple(names) for weight, names in owners.items() if weight in embeddings and len(names) > 1]


def token_tables(model: nn.Module) -> list[nn.Module]:
    """Token embeddings and the head, in the model's order; a weight that several of them own is there once."""
    own = [token_table(model), model.get_output_embeddings()]  # type: ignore[operator]
    own += [token_table(half) for half in halves_of(model)]
    weights = {id(module.weight) for module in own if isinstance(module, nn.Embedding | nn.Linear)}
    found: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.Linear) and id(module.weight) in weights:
            weights.discard(id(module.weight))
            found.append(module)
    return found


def linears(module: nn.Module) -> dict[str, nn.Module]:
    """Modules with a weight matrix to quantize, by name in ``module``, in the model's order."""
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear | Conv1D)}


def weight_of(linear: nn.Module) -> Tensor:
    """The weight as a matrix [N, K]: a view of the parameter, so that it can be written to."""
    weight = linear.get_parameter("weight").detach()
    return weight.t() if isinstance(linear, Conv1D) else weight
