"""The transformers model with an artifact's weights in it: what every package of that artifact must compute.

    quantized layers    (code - zero_point) · scale, from the artifact
    overrides           float tensors that tuning changed (folded norms), from the artifact
    everything else     the float checkpoint's

Blocks get their weights when a forward reaches them and lose them behind it, the embedding consists of the rows that
the token ids name, and lm_head is multiplied with some rows at a time.  So one block is in memory, whatever the size of
the model (streamed_model.py says for which families that cannot be done; those are loaded whole).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from roundexport.kernels._block_format import Format, rounded_tensor
from roundexport.quant.quantized_linear import QuantizedLinear

from .block_call import without_cache
from .blocks import halves_of
from .integer_inputs import recorded
from .main_input import main_input, token_table
from .output_head import output_tensor
from .streamed_model import StreamedModel

if TYPE_CHECKING:
    from roundexport.formats.artifact import Artifact

    from .checkpoint import Checkpoint
from .hooks import hooks

_PART = 1 << 22  # values of a table at a time: 16 MiB as float32


class DequantizedModel(StreamedModel):
    """A model that computes with an artifact's weights.

    Args:
        artifact: the integers and overrides.
        checkpoint: the float model they came from.
        integer_inputs: whether linears round their inputs to eight bits where the artifact says how.

    Raises:
        CheckpointError: transformers cannot build or load it, or the weights leave parameters unset.
        UnsupportedError: it has no blocks.
    """

    def __init__(self, artifact: Artifact, checkpoint: Checkpoint, integer_inputs: bool = False) -> None:
        self._artifact = artifact
        self._overrides = artifact.overrides()
        self._owner = {name: name for name in artifact.names()}
        for name in artifact.names():
            self._owner.update(dict.fromkeys(artifact.entry(name).info.shared_with, name))
        super().__init__(checkpoint)
        if not self.streamed:
            self._overwrite()
        for name, entering in (recorded(artifact) if integer_inputs else {}).items():
            self.model.get_submodule(name).register_forward_pre_hook(_rounding(entering))

    def run(self, inputs: Mapping[str, Tensor], noise: float = 0.0, vector: bool = False) -> Tensor:
        """Logits of the model's head, [B, S, V] of a decoder, or an encoder's last hidden states [B, S, H].

        Args:
            inputs: the model's arguments by name; ``input_ids`` [B, S], or an image model's pixels, among them.
            noise: relative size of random noise on the embedding's rows (on pixels), to see how much of it reaches the
                output.
            vector: the vector is wanted that a model of images makes itself.
        """
        main = main_input(self.model)
        with ExitStack() as opened:
            opened.enter_context(torch.no_grad())
            if self.streamed:
                opened.enter_context(self._chunked_tables(inputs[main]))
            tables = [token_table(part) for part in halves_of(self.model) or (self.model,)]
            if not any(tables):
                inputs = {**inputs, main: _shaken(inputs[main], noise)}
            for table in filter(None, tables):
                opened.enter_context(_noisy(table, noise))
            model = opened.enter_context(self.streamed_forward())
            found = model(**inputs, **without_cache(model))
        return output_tensor(found, vector)

    def read(self, name: str) -> Tensor:
        """One parameter as this artifact has it, float32 in memory of its own."""
        if name in self._overrides:
            return torch.from_numpy(np.array(self._overrides[name])).reshape(self._parameters[name].shape)
        module = name.removesuffix(".weight")
        if module in self._owner:
            weight = torch.from_numpy(self._artifact.linear(self._owner[module]).dequantize())
            return weight.t().contiguous() if isinstance(self.model.get_submodule(module), Conv1D) else weight
        return super().read(name)

    def row_chunks(self, name: str) -> Iterator[Tensor]:
        """The values of one parameter, some rows at a time."""
        module = name.removesuffix(".weight")
        if name in self._overrides or (name in self._parameters and module not in self._owner):
            yield from (self.read(name),) if name in self._overrides else super().row_chunks(name)
        elif module in self._owner:
            linear = self._artifact.linear(self._owner[module])
            yield from (torch.from_numpy(rows.dequantize()) for rows in _rows_of(linear))
        else:  # a tied lm_head, whose parameter has another name
            yield from _rows_in(self.checkpoint, name)

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows ``ids`` (ascending, [U]) of a parameter, float32 [U, …]."""
        owner = self._owner.get(name.removesuffix(".weight"))
        if owner is None or name in self._overrides:
            return super().rows(name, ids)
        return torch.from_numpy(self._artifact.linear(owner).rows(ids.numpy()).dequantize())

    @contextmanager
    def _chunked_tables(self, ids: Tensor) -> Iterator[None]:
        """While it lasts, what these ids need of the embedding is in memory, and lm_head is read as it is used."""
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        distinct = self.distinct(ids)
        with self.embedding(distinct, self.token_rows(distinct)):
            if head is None:
                yield
                return
            path = next(name for name, module in self.model.named_modules() if module is head)
            head.forward = lambda hidden: self._head(path, head, hidden)
            try:
                yield
            finally:
                del head.forward

    def _head(self, path: str, head: Any, hidden: Tensor) -> Tensor:
        logits = torch.cat([hidden @ rows.t() for rows in self.row_chunks(f"{path}.weight")], -1)
        biased: Tensor = logits if head.bias is None else logits + head.bias
        return biased

    def _overwrite(self) -> None:
        """Put the artifact's values into a model that was loaded whole."""
        untied = [module for module in self._owner if self._shares_a_parameter(module)]
        for module in untied:
            owner = self.model.get_submodule(module)
            owner.weight = nn.Parameter(owner.get_parameter("weight").detach().clone(), requires_grad=False)
        modules = dict(self.model.named_modules())
        names = [f"{module}.weight" for module in self._owner if module in modules]
        for name in (*self._overrides, *names):
            module, _, key = name.rpartition(".")
            modules[module].get_parameter(key).copy_(self.read(name))

    def _shares_a_parameter(self, module: str) -> bool:
        """Whether a quantized module's weight is another, not quantized, module's too."""
        weight = self.model.get_submodule(module).get_parameter("weight")
        others = [name for name, child in self.model.named_modules() if getattr(child, "weight", None) is weight]
        return any(name not in self._owner for name in others)


def _rounding(entering: Format) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook that rounds the inputs of a linear."""
    return lambda _, inputs: (rounded_tensor(inputs[0], entering), *inputs[1:])


def _rows_of(linear: QuantizedLinear) -> Iterator[QuantizedLinear]:
    step = max(1, _PART // linear.in_features)
    return (linear.rows(slice(start, start + step)) for start in range(0, linear.out_features, step))


def _rows_in(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    count, width = checkpoint.shape(name)
    step = max(1, _PART // width)
    for start in range(0, count, step):
        yield torch.from_numpy(checkpoint.float32(name, (start, min(start + step, count))))


@contextmanager
def _noisy(table: nn.Module, size: float) -> Iterator[None]:
    """While it lasts, a module's output is multiplied by 1 + size · noise."""
    with hooks([table.register_forward_hook(lambda _, __, output: _shaken(output, size))] if size else []):
        yield


def _shaken(values: Tensor, size: float) -> Tensor:
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)) if size else 0.0
    return values * (1 + size * noise)
