"""A block walked in stages, twice at once: with what is quantized so far in place, and float.

A stage is a group of linears that share an input tensor (q, k, v; o; gate, up; down), found by running the block once
and looking at which tensor each linear is called with.  At every stage all samples wait: their inputs on both sides are
handed out batch by batch, the stage's linears are quantized from them, and the walk goes on with the new weights:

    stage 0  x̂, x at q, k, v  → quantize q, k, v  → stage 1  x̂ at o, which has seen quantized q, k, v  → …

So every linear is fitted to the inputs it will really get, and the block is computed once per side in all.  A batch
waits by being a greenlet, a stack of its own in the same thread: the forward of the model's own code is stopped inside
a hook before a linear and taken up again later.  What a waiting batch holds is what its forward has alive there.  Where
that is too much memory, `keep=False` runs every batch again from the start and ends it by an exception at the stage:
no greenlets, nothing waits, the same numbers bit for bit, at more than twice the forwards.  (Threads instead of
greenlets did the same, but each kept freed memory to itself.)

The experts of a layer are one stage, which waits before they are called, with all tokens and what the router said of
each; which tokens an expert gets, and what its last linear gets, is worked out from these (common/expert_tokens.py).

A walk may be taken for some samples only (`samples`, whole batches): the others begin, from the block's start and with
the weights as they are then, when they are asked for.  So processes can share a block's samples (algorithms/parts.py).

Limits: a linear may be called once per forward, in the same order for every batch; one that is not is in no stage.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from roundexport.errors import UnsupportedError

from .block_call import BlockCall
from .blocks import linears, weight_of
from .experts import Experts
from .hooks import hooks
from .residual_writers import find_writers

Stage = tuple[str, ...]
Arguments = tuple[Any, ...]


def find_stages(block: nn.Module, call: BlockCall, hidden: Tensor) -> tuple[Stage, ...]:
    """Names of the block's linears in the order in which they run, those that share an input together.

    One that never runs, as its block reads the weight itself (Mamba's dt_proj), is in none.

    Args:
        block: the block.
        call: how it is called.
        hidden: hidden states of a sample, [1, S, H].

    Raises:
        UnsupportedError: a linear runs more than once.
    """
    seen: list[tuple[str, Tensor]] = []

    def noting(name: str) -> Callable[..., None]:
        return lambda module, args: seen.append((name, args[0]))

    modules = _stops(block)
    handles = [module.register_forward_pre_hook(noting(name)) for name, module in modules.items()]
    with hooks(handles), torch.no_grad():
        call.run(block, hidden)
    names = [name for name, _ in seen]
    for name in modules:
        if names.count(name) > 1:
            raise UnsupportedError(
                f"{name} runs {names.count(name)} times in a forward of its block; tuning stage by stage needs one"
            )
    stages: list[tuple[list[str], Tensor]] = []
    for name, entering in seen:
        inside = [f"{name}.{own}" for own in linears(modules[name])] if isinstance(modules[name], Experts) else None
        if inside is not None:
            stages.append((inside, torch.empty(0)))  # which no other linear is called with
        elif stages and entering is stages[-1][1]:
            stages[-1][0].append(name)
        else:
            stages.append(([name], entering))
    return tuple(tuple(group) for group, _ in stages)


def experts_of(block: nn.Module, stage: Stage) -> Experts | None:
    """The experts that a stage consists of; None: it is one of linears that share an input."""
    stop = _stop_of(block, stage)
    return stop if isinstance(stop, Experts) else None


def _stops(block: nn.Module) -> dict[str, nn.Module]:
    """Before what a forward can wait: experts of a layer as a whole, and every other linear."""
    experts = {name: module for name, module in block.named_modules() if isinstance(module, Experts)}
    inside = tuple(f"{name}." for name in experts)
    return {**experts, **{name: module for name, module in linears(block).items() if not name.startswith(inside)}}


def _stop_of(block: nn.Module, stage: Stage) -> nn.Module:
    """Before what a forward waits for a stage."""
    return next(module for name, module in _stops(block).items() if stage[0] == name or stage[0].startswith(f"{name}."))


class StagedForward:
    """A walk through a block; use as a context, visit :attr:`stages` in order, then take :meth:`outputs`.

    Args:
        block: the float block, on ``device``; not changed.
        call: how it is called.
        quantized: hidden states [n, S, H] that enter it through the quantized prefix.
        floats: those of the float model.
        batch_size: samples per batch.
        device: where to compute.
        keep: hold every batch where it waits; False: run it again for each stage, without greenlets.
    """

    def __init__(
        self,
        block: nn.Module,
        call: BlockCall,
        quantized: Tensor,
        floats: Tensor,
        batch_size: int,
        device: torch.device,
        keep: bool = True,
    ) -> None:
        self.stages = find_stages(block, call, floats[:1].to(device))
        self._writers = find_writers(block, call, floats[:1].to(device), self.stages)
        self._copy, self._block = copy.deepcopy(block), block
        self._sides = tuple(
            _Side(module, call, hidden, batch_size, device, self.stages, self._writers[:-1], keep)
            for module, hidden in ((self._copy, quantized), (block, floats))
        )

    def __enter__(self) -> StagedForward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up what waits."""
        for side in self._sides:
            side.close()

    def inputs(self, stage: int, samples: range | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The stage's inputs batch by batch: x̂ (through what is quantized) and x (float), each [b, S, K].

        Args:
            stage: number of the stage.
            samples: numbers of samples, whole batches; None: all.
        """
        for start, pair in zip(self._sides[0].starts(samples), self.calls(stage, samples), strict=True):
            first, second = (side.batch(start) for side in self._sides)
            yield _by_sample(pair[0][0], first), _by_sample(pair[1][0], second)

    def residual_error(self, stage: int, start: int) -> Tensor | None:
        """What the residual stream lacks where a stage's linear adds to it: the float side less the quantized one.

        Args:
            stage: number of the stage, whose inputs of this batch were handed out last.
            start: number of the batch's first sample.

        Returns:
            [b, S, H]; None where the stage does not write to the residual stream.
        """
        if not set(self.stages[stage]) & set(self._writers):
            return None
        quantized, floats = (side.residual(start) for side in self._sides)
        return floats - quantized

    def calls(self, stage: int, samples: range | None = None) -> Iterator[tuple[Arguments, Arguments]]:
        """What the stage is called with batch by batch, on either side; experts: tokens, chosen experts, shares."""
        yield from zip(*(side.calls(stage, samples) for side in self._sides), strict=True)

    def experts(self, stage: int) -> tuple[Experts, Experts] | None:
        """The experts of a stage with what is quantized so far in place, and float; None: a stage of linears."""
        pair = experts_of(self._copy, self.stages[stage]), experts_of(self._block, self.stages[stage])
        return None if pair[0] is None or pair[1] is None else (pair[0], pair[1])

    def replace(self, name: str, weight: Tensor) -> None:
        """Go on with a quantized weight [N, K] in place of a linear's own."""
        self.rounded(name).copy_(weight)

    def rounded(self, name: str) -> Tensor:
        """A linear's weight as it is gone on with, [N, K]."""
        return weight_of(linears(self._copy)[name])

    def outputs(self, quantized: Tensor | None, floats: Tensor | None, samples: range | None = None) -> None:
        """Put what leaves the block on either side into tensors [n, S, H]; None: nobody needs it."""
        for side, out in zip(self._sides, (quantized, floats), strict=True):
            if out is not None:
                side.outputs(out, samples)


class _Side:
    """One of the two blocks, with every batch on its way through it."""

    def __init__(
        self,
        block: nn.Module,
        call: BlockCall,
        hidden: Tensor,
        batch_size: int,
        device: torch.device,
        stages: tuple[Stage, ...],
        noted: tuple[str, ...],
        keep: bool,
    ) -> None:
        self._hidden, self._size, self._device, self._keep = hidden, batch_size, device, keep
        self._block, self._call = block, call
        self._first_of = [_stop_of(block, stage) for stage in stages]
        waiting = enumerate(self._first_of if keep else ())
        self._handles = [module.register_forward_pre_hook(_waiting(index)) for index, module in waiting]
        self._noted = [linears(block)[name] for name in noted]
        self._handles += self._noting() if keep else []
        self._runs: dict[int, _Run] = {}  # by the number of the batch's first sample
        self._added: Tensor | None = None  # to the residual stream, by the batch that is run again

    def starts(self, samples: range | None) -> range:
        """Numbers of the first samples of batches."""
        return range(0, len(self._hidden), self._size) if samples is None else samples[:: self._size]

    def calls(self, stage: int, samples: range | None) -> Iterator[Arguments]:
        for start in self.starts(samples):
            if self._keep:
                yield self._run(start).advance(stage)
            else:
                self._added = None
                with hooks(self._noting()):
                    entering = _run_up_to(self._first_of[stage], partial(self._forward, start))
                yield entering

    def batch(self, start: int) -> Tensor:
        """Hidden states of the batch that begins there."""
        return self._hidden[start : start + self._size]

    def residual(self, start: int) -> Tensor:
        """The residual stream of the batch where it is, [b, S, H]."""
        added, entered = self._runs[start].added if self._keep else self._added, self.batch(start).to(self._device)
        return entered if added is None else entered + added.reshape(entered.shape)

    def outputs(self, out: Tensor, samples: range | None) -> None:
        for start in self.starts(samples):
            with torch.no_grad():
                out[start : start + self._size] = self._run(start).finish() if self._keep else self._forward(start)

    def close(self) -> None:
        for run in self._runs.values():
            run.cancel()
        for handle in self._handles:
            handle.remove()

    def _noting(self) -> list[RemovableHandle]:
        return [module.register_forward_hook(self._adds) for module in self._noted]

    def _adds(self, _: nn.Module, __: Arguments, output: Tensor) -> None:
        """Note what a linear adds to the residual stream, for the next one: a copy, as others may add in place."""
        if not self._keep:
            self._added = output.clone() if self._added is None else self._added + output
            return
        run = greenlet.getcurrent()
        if isinstance(run, _Run):
            run.added = output.clone() if run.added is None else run.added + output

    def _run(self, start: int) -> _Run:
        """A batch's forward: the one that waits, or a new one."""
        if start not in self._runs:
            self._runs[start] = _Run(partial(self._forward, start))
        return self._runs[start]

    def _forward(self, start: int) -> Tensor:
        return self._call.run(self._block, self._hidden[start : start + self._size].to(self._device))


def _by_sample(values: Tensor, hidden: Tensor) -> Tensor:
    """What enters a stage as [b, S, K], also where the block strings samples together (OPT's feed-forward does)."""
    samples, length = hidden.shape[:2]
    if values.ndim == 2 and len(values) == samples * length:
        return values.reshape(samples, length, -1)
    return values


class _StageReachedError(Exception):
    """Ends a forward at a stage."""


def _run_up_to(first: nn.Module, forward: Callable[[], Tensor]) -> Arguments:
    """What a module is called with in a forward, which ends there."""
    entering: list[Arguments] = []

    def stop(_: nn.Module, args: Arguments) -> None:
        entering.append(args)
        raise _StageReachedError

    with hooks([first.register_forward_pre_hook(stop)]), torch.no_grad(), suppress(_StageReachedError):
        forward()
    return entering[0]


def _waiting(stage: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        run = greenlet.getcurrent()
        if isinstance(run, _Run):
            run.wait_at(stage, args)

    return hook


class _Run(greenlet.greenlet):  # type: ignore[misc]
    """The forward of one batch, which stops before each stage until it is told to go on."""

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        super().__init__(forward)
        self._wanted: int | None = None
        self.added: Tensor | None = None  # to the residual stream, by linears that others follow

    def wait_at(self, stage: int, entering: Arguments) -> None:
        """Called by the hook, inside the forward: hand out the input and wait, where this is the stage wanted."""
        if stage == self._wanted:
            self.parent.switch(entering)

    def advance(self, stage: int) -> Arguments:
        """Run up to a stage; returns what it is called with."""
        found: Arguments = self._until(stage)
        return found

    def finish(self) -> Tensor:
        """Run to the end; returns the block's output."""
        found: Tensor = self._until(None)
        return found

    def cancel(self) -> None:
        """Give up, freeing what the forward holds."""
        if not self.dead:
            self.throw()

    def _until(self, stage: int | None) -> Any:
        self._wanted = stage
        self.parent = greenlet.getcurrent()
        with torch.no_grad():  # out here, as all batches share the thread's mode and end in any order
            return self.switch()
