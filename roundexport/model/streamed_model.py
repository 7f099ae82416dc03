"""Weights per block: a model of which only what is being worked on is in memory.

    skeleton   the transformers model from its config: parameters on the meta device (shape, no values); buffers such as
               rotary frequencies are computed by their own modules while it is built, so they are real and right
    resident   what lies outside the blocks and is small (norms, position tables): read once, stays
    blocks     read from the checkpoint into memory of their own when a block's turn comes, dropped after it
    tables     token embedding and lm_head are never whole in memory: their rows are read in chunks, and the embedding
               holds only the rows that the calibration ids name; a hook turns an id into the place of its row

Values are the checkpoint's as float32, which are those that `load_model` gives, bit for bit
(tests/model/test_streamed_model.py).  Families whose weights transformers merges, splits or renames while loading
(some older files) cannot be read by name: there the whole model is loaded, and the same calls work.

Models with an encoder and a decoder are loaded whole too.

A parameter that two modules share is one object in the skeleton too, and is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from roundexport.types import PAIRS

from .bf16_linears import bfloat16_products
from .blocks import find_stack
from .experts import Expert, split_prefixes
from .hooks import hooks
from .main_input import token_table
from .skeleton import build_skeleton
from .torch_threads import ALIGNED_ROWS

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

_PART = 1 << 22  # values read at a time where a tensor is not kept: 16 MiB as float32
_CPU = torch.device("cpu")
_Place = tuple[nn.Module, str, nn.Parameter]  # a module, the name of a parameter of its own, and its stand-in


class StreamedModel:
    """A model and where its parameters come from.

    Args:
        checkpoint: the float model.
        whole: load all of it at once, as is done for families that cannot be read by name.
        bfloat16: blocks multiply in bfloat16 while they are worked on, see bf16_linears.py.

    Attributes:
        model: the transformers model in evaluation mode, without gradients.
        stack: its blocks.
        streamed: whether it is a skeleton.
        checkpoint, bfloat16: as given.

    Raises:
        CheckpointError: transformers cannot build or load it, or the weights leave parameters unset.
        UnsupportedError: it has no blocks.
    """

    def __init__(self, checkpoint: Checkpoint, whole: bool = False, bfloat16: bool = False) -> None:
        skeleton = None if whole or checkpoint.task in PAIRS else _skeleton(checkpoint)
        self.streamed = skeleton is not None
        self.model: nn.Module = checkpoint.load_model() if skeleton is None else skeleton
        self.model.requires_grad_(False)
        self.stack = find_stack(self.model)
        self.checkpoint, self.bfloat16 = checkpoint, bfloat16
        self._parameters = dict(self.model.named_parameters())
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._places = {id(block): _places(block) for block in self.stack.blocks}
        if self.streamed:
            self._load_resident()

    def reopen(self) -> StreamedModel:
        """The same once more, without what was done to this one."""
        return StreamedModel(self.checkpoint, bfloat16=self.bfloat16)

    @property
    def embedding_name(self) -> str | None:
        """Name of the token embedding's weight; None of a model of images, which has none."""
        table = token_table(self.model)  # in Marian another module than the first one with this very weight
        named = self.model.named_parameters()
        return next((name for name, weight in named if table is not None and weight is table.weight), None)

    def token_rows(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` (ascending, [U]) of the token embedding, float32 [U, H]; none where there is no embedding."""
        return torch.empty(0) if self.embedding_name is None else self.rows(self.embedding_name, ids)

    def distinct(self, samples: Tensor) -> Tensor:
        """The token ids that occur in samples, ascending; none in pixels."""
        found: Tensor = torch.unique(samples) if self.embedding_name else torch.empty(0, dtype=torch.long)
        return found

    def row_chunks(self, name: str) -> Iterator[Tensor]:
        """The values of one parameter in the float model, float32, some rows at a time; nothing of an unused pooler."""
        shape = self._parameters[name].shape
        step = max(1, _PART // max(1, shape[1:].numel())) if shape else 1
        step -= step % ALIGNED_ROWS if step > ALIGNED_ROWS else 0  # for who multiplies them
        for start in range(0, shape[0] if shape else 1, step):
            if not self.streamed:
                values = self._parameters[name].detach().float().cpu()
                yield values[start : start + step] if shape else values
            elif self.checkpoint.has(name):
                rows = (start, min(start + step, shape[0])) if shape else None
                yield torch.from_numpy(self.checkpoint.float32(name, rows))

    def all_row_chunks(self) -> Iterator[tuple[str, Tensor]]:
        """Name and values of every parameter once, in the model's order, some rows at a time."""
        for name in self._parameters:
            for part in self.row_chunks(name):
                yield name, part

    def read(self, name: str) -> Tensor:
        """One parameter of the float model, a float32 copy in memory of its own."""
        if not self.streamed:
            return self._parameters[name].detach().to(_CPU, torch.float32, copy=True)
        if not self.checkpoint.has(name):
            return torch.zeros(self._parameters[name].shape)  # of a pooler whose output nobody asks for
        values = torch.empty(self._parameters[name].shape)
        self.checkpoint.float32(name, out=values.numpy())
        return values

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows ``ids`` (ascending, [U]) of a parameter, float32 [U, …]; it is read once, in parts."""
        found = torch.empty(len(ids), *self._parameters[name].shape[1:])
        begin = done = 0
        for part in self.row_chunks(name):
            inside = ids[(ids >= begin) & (ids < begin + len(part))] - begin
            found[done : done + len(inside)] = part[inside]
            begin, done = begin + len(part), done + len(inside)
        return found

    @contextmanager
    def block(self, index: int, device: torch.device = _CPU) -> Iterator[nn.Module]:
        """A block with its weights on ``device``; they are dropped afterwards, with whatever was changed in them."""
        block = self.stack.blocks[index]
        try:
            self._take(block, device)
            with bfloat16_products(block) if self.bfloat16 else nullcontext():
                yield block
        finally:
            self._drop(block)

    @contextmanager
    def streamed_forward(self) -> Iterator[nn.Module]:
        """The model, whose blocks and experts get their weights when a forward reaches them and lose them after it."""
        blocks = self.stack.blocks if self.streamed else ()
        handles = []
        for block in blocks:
            experts = [module for module in block.modules() if isinstance(module, Expert)]
            inside = {id(place[2]) for expert in experts for place in _places(expert)}
            for module in (block, *experts):
                places = [one for one in _places(module) if module is not block or id(one[2]) not in inside]
                handles.append(module.register_forward_pre_hook(partial(_filling, self._fill, places)))
                handles.append(module.register_forward_hook(partial(_emptying, places)))
        try:
            with hooks(handles):
                yield self.model
        finally:
            for block in blocks:
                self._drop(block)  # where a forward was cut short

    @contextmanager
    def embedding(self, ids: Tensor, rows: Tensor) -> Iterator[None]:
        """While it lasts, the token embedding consists of the rows of some ids.

        Args:
            ids: distinct token ids, ascending, [U]; no others may enter the model.
            rows: their rows, float32 [U, H].
        """
        table = token_table(self.model)
        if table is None:
            yield
            return
        whole = table.weight
        # T5's encoder alone looks ids up in another module than the one that it names, which owns the same weight.
        lookups = [table, *(m for m in self.model.modules() if isinstance(m, nn.Embedding) and m.weight is whole)]
        lookups = list({id(module): module for module in lookups}.values())
        paddings = [getattr(module, "padding_idx", None) for module in lookups]

        def place(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (torch.searchsorted(ids, args[0].contiguous()), *args[1:])

        taken = nn.Parameter(rows, requires_grad=False)
        for module in lookups:  # padding matters to gradients only, and would be held against the number of rows
            module.weight, module.padding_idx = taken, None
        try:
            with hooks([module.register_forward_pre_hook(place) for module in lookups]):
                yield
        finally:
            for module, padding in zip(lookups, paddings, strict=True):
                module.weight, module.padding_idx = whole, padding

    @contextmanager
    def tables(self, ids: Tensor) -> Iterator[None]:
        """While it lasts, what these token ids need of the embedding, and lm_head, are in memory."""
        distinct = self.distinct(ids)
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        with ExitStack() as opened:
            if self.streamed:
                if head is not None:
                    own = head.weight
                    head.weight = nn.Parameter(self.read(self._names[id(own)]), requires_grad=False)
                    opened.callback(setattr, head, "weight", own)
                opened.enter_context(self.embedding(distinct, self.token_rows(distinct)))
            yield

    @contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """While it lasts, parameters that are in memory have other values, by name."""
        kept = {name: self.model.get_parameter(name).detach().clone() for name in values}
        try:
            for name, tensor in values.items():
                self.model.get_parameter(name).data.copy_(tensor)
            yield
        finally:
            for name, tensor in kept.items():
                self.model.get_parameter(name).data.copy_(tensor)

    def _load_resident(self) -> None:
        """Read what lies outside blocks and tables, and what the file has of buffers."""
        tables = [token_table(self.model), self.model.get_output_embeddings()]  # type: ignore[operator]
        inside = {id(parameter) for block in self.stack.blocks for parameter in block.parameters()}
        inside |= {id(table.weight) for table in tables if table is not None}
        self._fill([place for place in _places(self.model) if id(place[2]) not in inside])
        stored = self.model.state_dict(keep_vars=True)
        for name, buffer in self.model.named_buffers():
            if name in stored and self.checkpoint.has(name):
                buffer.copy_(torch.from_numpy(self.checkpoint.float32(name)))

    def _fill(self, places: list[_Place]) -> None:
        read: dict[int, nn.Parameter] = {}
        for module, key, empty in places:
            if id(empty) not in read:
                read[id(empty)] = nn.Parameter(self.read(self._names[id(empty)]), requires_grad=False)
            setattr(module, key, read[id(empty)])

    def _take(self, block: nn.Module, device: torch.device) -> None:
        if self.streamed:
            self._fill(self._places[id(block)])
        block.to(device)

    def _drop(self, block: nn.Module) -> None:
        if self.streamed:
            _empty(self._places[id(block)])
            for module in block.modules():
                for key, buffer in module.named_buffers(recurse=False):
                    setattr(module, key, buffer.to(_CPU))
        else:
            block.to(_CPU)


def _filling(fill: Callable[[list[_Place]], None], places: list[_Place], *_: Any) -> None:
    """A hook that reads the parameters in these places."""
    fill(places)


def _emptying(places: list[_Place], *_: Any) -> None:
    """A hook that lets go of them."""
    _empty(places)


def _empty(places: list[_Place]) -> None:
    for module, key, empty in places:
        setattr(module, key, empty)


def _places(module: nn.Module) -> list[_Place]:
    return [
        (child, key, parameter)
        for child in module.modules()
        for key, parameter in child.named_parameters(recurse=False)
    ]


def _skeleton(checkpoint: Checkpoint) -> nn.Module | None:
    """The model without weights; None where its parameters cannot be read by name."""
    model = build_skeleton(checkpoint)
    empty: dict[int, nn.Parameter] = {}
    for module, key, parameter in _places(model):
        if id(parameter) not in empty:
            stand_in = torch.empty_like(parameter, device="meta")
            empty[id(parameter)] = nn.Parameter(stand_in, requires_grad=False)
        setattr(module, key, empty[id(parameter)])
    return model if _readable(model, checkpoint) else None


def _readable(model: nn.Module, checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint holds every parameter under its own name and shape, as it is."""
    for name, parameter in model.named_parameters():
        if checkpoint.has(name):
            if checkpoint.shape(name) != tuple(parameter.shape):
                return False
        elif not checkpoint.may_lack(name):
            return False
    converters = [item for item in get_model_conversion_mapping(model) if isinstance(item, WeightConverter)]
    experts = split_prefixes(model)
    stored = [name for name, _ in model.named_parameters() if not name.startswith(experts)]
    return not any(converter.rename_source_key(name)[1] for converter in converters for name in stored)
