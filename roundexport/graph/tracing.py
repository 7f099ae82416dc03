"""One trace of a model's forward by `torch.export`, and the true reason where it cannot be had.

Decoders are called with a cache that hands new keys, values and states through, encoders without any, encoders of
images with pixels of one size.  Whatever is raised on the way comes from the model's own code or from torch's
internals, of any class; here it becomes one error that names the line of the model's code at which it happened, and the
cause where that is known:

    the forward decides by values        torch.export follows one path for all inputs and cannot
    no attention interface               attention is spelled out: it cannot be given a KV cache
"""

from __future__ import annotations

import inspect
import io
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from roundexport.errors import RoundexportError, UnsupportedError
from roundexport.model._patches import code_when_called, sets_in_order
from roundexport.model.block_call import without_cache
from roundexport.model.cache_argument import cache_argument
from roundexport.model.main_input import main_input
from roundexport.model.output_head import output_tensor

from .attention import AttentionTrace
from .decomposition import QuickProgram
from .states import StateTrace

_SAMPLES = 8123  # of a sound: any number that is not a round one
_UNITS = 9, 14  # any two numbers of rows and columns
DECODER_INPUTS = ("input_ids", "attention_mask", "position_ids")


class DecoderCall(nn.Module):
    """A decoder called with a cache that hands new keys, values and states through.

    Args:
        model: with its placeholders in place.
        trace: of its attention; filled.
        states: of what else it carries from token to token; filled.
    """

    def __init__(self, model: nn.Module, trace: AttentionTrace, states: StateTrace) -> None:
        super().__init__()
        self.model, self.trace, self.states = model, trace, states
        # Where layers share keys and values, transformers slices masks for the sake of generate; not with such a value.
        shares = getattr(model.config, "num_kv_shared_layers", 0) and _takes(model, "logits_to_keep")
        self.more: dict[str, Any] = {"logits_to_keep": slice(None)} if shares else {}

    def logits(self, attention_mask: Tensor, position_ids: Tensor, **tokens: Tensor) -> Tensor:
        """Logits [B, S, V] of ``input_ids`` or ``inputs_embeds``."""
        self.trace.start()
        self.states.start()
        out = self.model(
            **tokens,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **cache_argument(self.model, self.states.cache(self.model.config)),
            **self.more,
        )
        return out.logits  # type: ignore[no-any-return]


class _Decoder(DecoderCall):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        return self.logits(attention_mask, position_ids, input_ids=input_ids)


class _Encoder(nn.Module):
    def __init__(self, model: nn.Module, trace: AttentionTrace, pooled: nn.Module | None) -> None:
        super().__init__()
        self.model, self.trace, self.pooled = model, trace, pooled
        self.more = without_cache(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        self.trace.start()
        more = self.more if token_type_ids is None else {**self.more, "token_type_ids": token_type_ids}
        out = output_tensor(self.model(input_ids=input_ids, attention_mask=attention_mask, **more))
        return out if self.pooled is None else self.pooled(out, attention_mask)


class _Names:
    """Names of outputs, once they are known; an object of its own, as torch.export puts attributes of modules back."""

    found: tuple[str, ...] = ()


class _Images(nn.Module):
    def __init__(self, model: nn.Module, trace: AttentionTrace, wanted: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.trace, self.wanted = model, trace, wanted
        self.names = _Names()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        self.trace.start()
        out = self.model(pixel_values=pixel_values)
        self.names.found = tuple(name for name in self.wanted if out.get(name) is not None)
        return tuple(out[name].float() for name in self.names.found)


def trace_images(
    model: nn.Module,
    trace: AttentionTrace,
    shape: tuple[int, int, int],
    wanted: tuple[str, ...],
    unit: int | None = None,
) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """Export the forward of a model of images with a dynamic batch.

    Args:
        model: with its placeholders in place.
        trace: of its attention; filled.
        shape: channels, height and width of the pixels.
        wanted: names of outputs, of which the program has those that the model gives.
        unit: height and width are any multiples of it; None: they are those of the shape.

    Returns:
        The program, and the names of its outputs.

    Raises:
        UnsupportedError: it cannot be traced; the text names the place and the reason.
    """
    wrapper = _Images(model, trace, wanted)
    dynamic: dict[str, dict[int, Any]] = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
    if unit is not None:
        shape = shape[0], unit * _UNITS[0], unit * _UNITS[1]
        dynamic["pixel_values"] |= {2: unit * torch.export.Dim("rows"), 3: unit * torch.export.Dim("columns")}
    program = export_module(wrapper, {"pixel_values": torch.zeros(2, *shape)}, dynamic, trace, StateTrace())
    return program, wrapper.names.found


class _Sounds(nn.Module):
    def __init__(self, model: nn.Module, trace: AttentionTrace) -> None:
        super().__init__()
        self.model, self.trace = model, trace

    def forward(self, input_values: Tensor) -> Tensor:
        self.trace.start()
        return output_tensor(self.model(input_values=input_values))


def trace_sounds(model: nn.Module, trace: AttentionTrace) -> torch.export.ExportedProgram:
    """Export the forward of a model of samples [B, T] with a dynamic batch and length.

    Args:
        model: with its placeholders in place.
        trace: of its attention; filled.

    Raises:
        UnsupportedError: it cannot be traced; the text names the place and the reason.
    """
    samples = {"input_values": torch.zeros(2, _SAMPLES)}
    dynamic = {"input_values": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    return export_module(_Sounds(model, trace), samples, dynamic, trace, StateTrace())


def trace_forward(
    model: nn.Module, trace: AttentionTrace, states: StateTrace, decoder: bool, pooled: nn.Module | None = None
) -> torch.export.ExportedProgram:
    """Export the model's forward with dynamic batch and lengths.

    Args:
        model: with its placeholders in place.
        trace: of its attention; filled.
        states: of what else it carries from token to token; filled.
        decoder: whether it generates.
        pooled: of an encoder, what makes its output of hidden states and the attention mask; None: they are it.

    Raises:
        UnsupportedError: it cannot be traced; the text names the place and the reason.
    """
    wrapper = _Decoder(model, trace, states) if decoder else _Encoder(model, trace, pooled)
    names = inputs_of(model, decoder)
    batch, new, past = 2, 5, 7
    samples = {
        "input_ids": torch.zeros(batch, new, dtype=torch.long),
        "position_ids": torch.arange(past, past + new).expand(batch, new).clone(),
        "token_type_ids": torch.zeros(batch, new, dtype=torch.long),
        "attention_mask": torch.ones(batch, new + (past if decoder else 0), dtype=torch.long),
    }
    dynamic = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in names}
    return export_module(wrapper, {name: samples[name] for name in names}, dynamic, trace, states)


def export_module(
    module: nn.Module, samples: dict[str, Any], dynamic: dict[str, Any], trace: AttentionTrace, states: StateTrace
) -> torch.export.ExportedProgram:
    """Export a module around a model.

    Args:
        module: what calls the model, which it holds as ``model``, with its placeholders in place.
        samples: arguments by name.
        dynamic: which of their axes are dynamic.
        trace: of the model's attention; filled.
        states: of the states that it carries.

    Raises:
        UnsupportedError: it cannot be traced; the text names the place and the reason.
    """
    try:
        with torch.no_grad(), _quiet(), _quick(), code_when_called(), sets_in_order(module):
            return QuickProgram.of(torch.export.export(module, (), samples, dynamic_shapes=dynamic, strict=False))
    except RoundexportError:
        raise
    except Exception as error:  # the model's own code and torch's internals raise whatever they please
        raise UnsupportedError(_reason(module.get_submodule("model"), trace, states, error)) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what torch.export says of its own internals: warnings, and whole graphs on stderr where it fails."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def _quick() -> Iterator[None]:
    """Without what nobody reads, a quarter of a trace: where in which file each node was made; fake results by input.

    A model of many blocks finds some of those results again, which saves what keeping them costs, and no more.
    """
    config = torch.fx.config
    before, config.do_not_emit_stack_traces = config.do_not_emit_stack_traces, True
    try:
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            yield
    finally:
        config.do_not_emit_stack_traces = before


def inputs_of(model: nn.Module, decoder: bool) -> tuple[str, ...]:
    """Names of the inputs of a model's graph."""
    if decoder:
        return DECODER_INPUTS
    if (main := main_input(model)) != "input_ids":
        return (main,)
    if getattr(model.config, "type_vocab_size", 0) > 1:
        return ("input_ids", "attention_mask", "token_type_ids")
    return ("input_ids", "attention_mask")


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def _reason(model: nn.Module, trace: AttentionTrace, states: StateTrace, error: Exception) -> str:
    name = type(model).__name__
    if (unfinished := states.unfinished()) is not None:
        return f"{name}: {unfinished}{_place(error)}"
    if (
        not trace.layers
        and not states.found
        and not hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")
    ):
        return (
            f"{name} spells its attention out instead of using transformers' attention interface; it cannot be "
            f"exported with our attention{_place(error)}"
        )
    lines = str(error).strip().splitlines()
    first = lines[0].strip() if lines else ""
    if "data-dependent" in first:
        return f"{name}: its forward decides by values in tensors, which torch.export cannot follow{_place(error)}"
    return f"{name}: torch.export cannot capture its forward: {type(error).__name__}: {first:.300}{_place(error)}"


def _place(error: BaseException) -> str:
    """The innermost line of a modeling file that the error went through, in brackets."""
    for one in _chain(error):
        for frame in reversed(traceback.extract_tb(one.__traceback__)):
            if Path(frame.filename).name.startswith("modeling_"):
                return f" ({Path(frame.filename).name}, line {frame.lineno}: {frame.line})"
    return ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it, innermost first."""
    if error is not None:
        yield from _chain(error.__cause__ or (None if error.__suppress_context__ else error.__context__))
        yield error
