"""A block run by itself, with hidden states of our choice: what else it is called with is captured from the real model.

    capture   one forward of the real model per probe batch, with a hook before every block, yields what each block is
              called with: rotary tables, masks, flags, per block where they differ (sliding and full attention)
    run       the block with hidden states of our choice, and, where given, other weights in place of its own

What is captured is used again for every sample, so it may depend on the length of a sample but not on its content:
samples share a length and have no padding, which makes that true of masks and positions.  It is checked, by two probe
batches of different samples and different size; a model that hands a block something else that depends on the sample
(per-layer token embeddings, a cache, the first block's output) is refused with the name of that argument.

Limits: what happens between the blocks must be nothing, i.e. a block's output is the next one's input (checked too).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from roundexport.errors import UnsupportedError

from .blocks import Stack, linears
from .hooks import hooks
from .main_input import named

HIDDEN = "hidden_states"


@dataclass(frozen=True)
class _Shared:
    """A captured tensor; ``batched`` when its first axis is the batch (times heads), of which one sample is kept."""

    tensor: Tensor
    batched: bool


@dataclass(frozen=True)
class _Carried:
    """Stands for what rides behind the hidden states, see half_runs.py."""


@dataclass(frozen=True, eq=False)
class BlockCall:
    """How a block is called, for any samples of the length it was captured with; made by :func:`capture_calls`.

    Args:
        args: positional arguments after the hidden states.
        kwargs: keyword arguments but the hidden states.
        hidden_by_name: the block takes its hidden states by keyword.
        carried: positions behind the hidden states that are not the block's: what another half gave, which the block
            looks at, and which leaves it as it came.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_by_name: bool
    carried: int = 0

    def run(
        self,
        block: nn.Module,
        hidden: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        others: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Output of a block.

        Args:
            block: the block this call was captured from.
            hidden: [B, S, H]; the last ``carried`` of S ride along.
            weights: matrices [N, K] to use in place of the block's own, by the linear's name in the block.
            others: other parameters (norms, biases) to use in place of its own, by parameter name in the block.

        Returns:
            [B, S, H]; with gradients where ``weights`` or ``others`` ask for them.
        """
        hidden, carried = hidden[:, : hidden.shape[1] - self.carried], hidden[:, hidden.shape[1] - self.carried :]
        args, kwargs = _place(self.args, hidden, carried), _place(self.kwargs, hidden, carried)
        if self.hidden_by_name:
            kwargs[HIDDEN] = hidden
        else:
            args = (hidden, *args)
        if weights is None and others is None:
            return self._joined(_hidden_of(block(*args, **kwargs)), carried)
        modules, swapped = linears(block), dict(others or {})
        for name, weight in (weights or {}).items():
            swapped[f"{name}.weight"] = weight.t() if isinstance(modules[name], Conv1D) else weight
        return self._joined(_hidden_of(torch.func.functional_call(block, swapped, args, kwargs)), carried)

    def _joined(self, output: Tensor, carried: Tensor) -> Tensor:
        return torch.cat([output, carried], 1) if self.carried else output


def capture_calls(model: nn.Module, stack: Stack, ids: Tensor) -> list[BlockCall]:
    """How each block is called for samples of this length.

    Args:
        model: the whole model, in evaluation mode.
        stack: its blocks.
        ids: token ids [n, S], or pixels [n, C, H, W], of calibration samples; up to three are used.

    Returns:
        One call per block.

    Raises:
        UnsupportedError: an argument depends on the sample, or something happens between the blocks.
    """
    # Probes of one and two different samples; where there is but one, ids of another order stand in for the second.
    other = ids[1:2] if len(ids) > 1 else ids[:1].roll(1, dims=1)
    try:
        single = _record(model, stack, ids[:1])
        double = _record(model, stack, torch.cat([other, ids[-1:]]))
        behind = getattr(model, "carried", None)  # what the forward has left there
        carried = 0 if behind is None else behind.shape[1]
        return [_call(stack.block_name(i), *pair, carried) for i, pair in enumerate(zip(single, double, strict=True))]
    except UnsupportedError as error:
        raise UnsupportedError(f"{error}; --recipe rtn runs no block and takes such models") from error


def first_hidden(
    model: nn.Module,
    stack: Stack,
    ids: Tensor,
    batch_size: int,
    out: Tensor | None = None,
    done: Callable[[], None] = lambda: None,
) -> Tensor:
    """Hidden states that enter the first block, float32 [n, S, H]; nothing after them is computed.

    Args:
        model: the whole model; weights of its blocks are not needed.
        stack: its blocks.
        ids: token ids [n, S], or pixels.
        batch_size: samples at a time.
        out: where to put them; None: memory of its own.
        done: called after every batch.
    """
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(_split(stack.block_name(0), args, kwargs)[0].detach())
        raise _StopForwardError

    with hooks([stack.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)]):
        for start in range(0, len(ids), batch_size):
            with suppress(_StopForwardError):
                _forward(model, ids[start : start + batch_size])
            if out is None:
                found[-1] = found[-1].clone()
            else:
                out[start : start + batch_size] = found.pop()
            done()
    return torch.cat(found) if out is None else out


def run_all(
    block: nn.Module,
    call: BlockCall,
    hidden: Tensor,
    batch_size: int,
    device: torch.device,
    weights: Mapping[str, Tensor] | None = None,
    out: Tensor | None = None,
    done: Callable[[], None] = lambda: None,
) -> Tensor:
    """Output of a block for all samples, in main memory, without gradients.

    Args:
        block: the block, on ``device``.
        call: how it is called.
        hidden: [n, S, H].
        batch_size: samples at a time.
        device: where to compute.
        weights: see :meth:`BlockCall.run`.
        out: where to put the output, [n, S, H]; None: memory of its own.
        done: called after every batch.
    """
    found = torch.empty_like(hidden) if out is None else out
    with torch.no_grad():
        for start in range(0, len(hidden), batch_size):
            part = slice(start, start + batch_size)
            found[part] = call.run(block, hidden[part].to(device), weights)
            done()
    return found


class _StopForwardError(Exception):
    """Ends a model's forward once the hidden states were seen."""


def without_cache(model: nn.Module) -> dict[str, Any]:
    """Arguments of a model's forward that keep it from making a KV cache, where it would.

    Some classes with a head hand on what they do not name to the model without one, which is what makes the cache.
    """
    taken, inner = inspect.signature(model.forward).parameters, getattr(model, "base_model", model)
    hands_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
    names = taken.keys() | (inspect.signature(inner.forward).parameters.keys() if hands_on else set())
    return {"use_cache": False} if "use_cache" in names else {}


def _forward(model: nn.Module, ids: Tensor) -> None:
    places = (
        parameter.device for parameter in model.parameters() if not parameter.is_meta
    )  # a skeleton's: streamed_model.py
    device = next(places, torch.device("cpu"))
    with torch.no_grad():
        model(**named(model, ids.to(device)), **without_cache(model))


@dataclass(frozen=True, eq=False)
class _Seen:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_by_name: bool
    follows: bool  # its hidden states are the output of the block before


def _record(model: nn.Module, stack: Stack, ids: Tensor) -> list[_Seen]:
    """Run the model once, up to its lm_head, and keep what every block was called with but the hidden states."""
    seen: dict[int, _Seen] = {}
    last: dict[int, Tensor] = {}  # output of the block that ran last

    def hook(index: int) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if index in seen:
                raise UnsupportedError(f"{stack.block_name(index)} runs more than once in a forward")
            hidden, rest, named, by_name = _split(stack.block_name(index), args, kwargs)
            carried = getattr(model, "carried", None)
            rest, named = _marked(rest, carried), _marked(named, carried)
            follows = index - 1 in last and torch.equal(hidden, last[index - 1])
            seen[index] = _Seen(rest, named, by_name, follows)
            last.clear()
            last[index] = _hidden_of(output)

        return keep

    def stop(*_: Any) -> None:
        raise _StopForwardError

    handles = [block.register_forward_hook(hook(index), with_kwargs=True) for index, block in enumerate(stack.blocks)]
    find_head: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    if head is not None:
        handles.append(head.register_forward_pre_hook(stop))
    with hooks(handles), suppress(_StopForwardError):  # logits of a whole vocabulary are large
        _forward(model, ids)
    for index in range(len(stack.blocks)):
        if index not in seen:
            raise UnsupportedError(f"{stack.block_name(index)} does not run in the model's forward")
        if index and not seen[index].follows:
            raise UnsupportedError(
                f"{stack.block_name(index)}: its input is not the output of the block before; "
                "models that compute something between blocks are not supported"
            )
    return [seen[index] for index in range(len(stack.blocks))]


def _split(
    where: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any], bool]:
    """Hidden states, remaining positional and keyword arguments, and whether the hidden states came by keyword."""
    if args and isinstance(args[0], Tensor):
        return args[0], args[1:], kwargs, False
    if isinstance(kwargs.get(HIDDEN), Tensor):
        return kwargs[HIDDEN], args, {name: value for name, value in kwargs.items() if name != HIDDEN}, True
    raise UnsupportedError(f"{where}: takes no hidden states as its first argument")


def _hidden_of(output: Any) -> Tensor:
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor):
        raise UnsupportedError(f"a block returned {type(first).__name__} where hidden states were expected")
    return first


def _marked(value: Any, carried: Tensor | None) -> Any:
    """Arguments with a mark in the place of what rides along."""
    if carried is not None and value is carried:
        return _Carried()
    if isinstance(value, dict):
        return {name: _marked(item, carried) for name, item in value.items()}
    return tuple(_marked(item, carried) for item in value) if isinstance(value, tuple) else value


def _call(where: str, single: _Seen, double: _Seen, carried: int) -> BlockCall:
    args = _common(single.args, double.args, where)
    kwargs = _common(single.kwargs, double.kwargs, where)
    return BlockCall(args, kwargs, single.hidden_by_name, carried)


def _common(one: Any, two: Any, where: str) -> Any:
    """What an argument of the one-sample and of the two-sample probe have in common, or a refusal."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return _common_tensor(one, two, where)
    if type(one) is not type(two):
        raise UnsupportedError(f"{where}: an argument changes its type from sample to sample")
    if isinstance(one, dict) and one.keys() == two.keys():
        return {name: _common(one[name], two[name], f"{where}, argument {name}") for name in one}
    if isinstance(one, tuple | list) and len(one) == len(two):
        return type(one)(_common(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(one, two, strict=True)))
    if one is None or isinstance(one, _Carried) or (isinstance(one, bool | int | float | str) and one == two):
        return one
    raise UnsupportedError(
        f"{where}: {type(one).__name__} cannot be shared between samples; models whose blocks need it are not supported"
    )


def _common_tensor(one: Tensor, two: Tensor, where: str) -> _Shared:
    twice = torch.cat([one, one]) if one.ndim else one
    batched = one.ndim > 0 and two.shape == twice.shape
    expected = twice if batched else one
    if one.dtype == two.dtype and two.equal(expected):
        return _Shared(one, batched)
    raise UnsupportedError(
        f"{where}: a tensor {list(one.shape)} depends on the sample; only hidden states may, so this model's blocks "
        "cannot be tuned one at a time"
    )


def _place(value: Any, hidden: Tensor, carried: Tensor) -> Any:
    """Captured arguments for a batch: on its device, one sample's repeated where the batch is an axis."""
    if isinstance(value, _Carried):
        return carried
    if isinstance(value, _Shared):
        tensor = value.tensor.to(hidden.device)
        if not value.batched:
            return tensor
        once = (1,) * (tensor.ndim - 1)
        return tensor.expand(len(hidden), *tensor.shape[1:]) if len(tensor) == 1 else tensor.repeat(len(hidden), *once)
    if isinstance(value, dict):
        return {name: _place(item, hidden, carried) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_place(item, hidden, carried) for item in value)
    return value
