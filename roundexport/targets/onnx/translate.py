"""From the captured program to an ONNX graph in which the placeholders are still placeholders.

torch's own exporter translates the model's arithmetic; for the operators of placeholders.py it gets functions that emit
nodes of the same name in the domain ``roundexport``.  Inputs and dynamic axes then get the names that clients expect,
and everything that speaks of this machine (stack traces, file names) is dropped.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import values as script

from roundexport.errors import UnsupportedError
from roundexport.graph import halves
from roundexport.graph.capture import Capture
from roundexport.model._patches import code_when_called

from .graph import PLACEHOLDER
from .promotion import quick_promotion
from .settings import IR_VERSION, OPSET

BATCH, NEW, TOTAL, PAST = "batch_size", "sequence_length", "total_sequence_length", "past_sequence_length"
SOURCE = "encoder_sequence_length"

_INT, _FLOAT = onnx.defs.OpSchema.AttrType.INT, onnx.defs.OpSchema.AttrType.FLOAT
# name -> (inputs, outputs, attributes): the same as the schemas of placeholders.py and states.py
_PLACEHOLDERS: dict[str, tuple[tuple[str, ...], tuple[str, ...], dict[str, Any]]] = {
    "linear": (("x",), ("y",), {"index": _INT, "out_features": _INT}),
    "grouped_linear": (("x", "counts"), ("y",), {"index": _INT, "out_features": _INT}),
    "embedding": (("ids",), ("rows",), {"index": _INT, "width": _INT}),
    "attention": (
        ("q", "k", "v", "mask", "bias", "sinks"),
        ("y",),
        {"index": _INT, "scale": _FLOAT, "window": _INT, "softcap": _FLOAT, "causal": _INT},
    ),
    "rope": (("x", "cos", "sin"), ("y",), {"index": _INT, "interleaved": _INT}),
    "rms_norm": (("x", "weight"), ("y",), {"eps": _FLOAT}),
    "causal_conv": (("x", "weight", "bias"), ("y",), {"index": _INT, "silu": _INT}),
    "linear_attention": (("q", "k", "v", "decay", "beta"), ("y",), {"index": _INT, "groups": _INT, "scale": _FLOAT}),
    "weighted_average": (("k", "v", "decay", "first"), ("y",), {"index": _INT}),
    "tokens_only": (("x", "mask"), ("y",), {}),
}
_MAY_LACK = ("mask", "bias", "sinks", "beta")


def translate(captured: Capture) -> ir.Model:
    """The captured program as an ONNX model with placeholder nodes.

    Returns:
        A model with inputs ``captured.inputs`` and outputs ``captured.outputs``; small parameters are initializers.

    Raises:
        UnsupportedError: an operator of the model has no translation.
    """
    try:
        with _quiet(), quick_promotion(), code_when_called():
            exported = torch.onnx.export(
                captured.program,
                (),
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                custom_translation_table=_translations(),
                input_names=list(captured.inputs),
                output_names=list(captured.outputs),
            )
    except (MemoryError, OSError):
        raise
    except Exception as error:  # the exporter's own errors share no public base class
        raise UnsupportedError(f"ONNX has no form for a part of the captured model: {_reason(error)}") from error
    if exported is None:
        raise AssertionError("torch.onnx.export(dynamo=True) returns a program")
    model: ir.Model = exported.model
    passes.ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.producer_version, model.ir_version = "roundexport", "", IR_VERSION
    model.graph.name = "roundexport"
    model.metadata_props.clear()
    _name_axes(model.graph, captured)
    return model


def _reason(error: BaseException) -> str:
    """The operator it stopped at, where the innermost error names one; else that error's first line."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    text = str(error)
    lines = text.strip().splitlines() or [type(error).__name__]
    why = text.partition("Failure message: ")[2].partition("\n")[0]
    operators = dict.fromkeys(re.findall(r"\b(?:aten|prims|prim|quantized|roundexport)[.:]+\w+", text))
    named = f"{', '.join(operators)}{f' ({why})' if why else ''}"
    return named if operators else lines[0][:400]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporter says about its own internals and about torchvision: nothing a user could act on."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _translations() -> dict[Any, Any]:
    domain = script.Opset(PLACEHOLDER, 1)
    table = {}
    for name, (inputs, outputs, attributes) in _PLACEHOLDERS.items():
        operator = script.Op(domain, name, _schema(name, inputs, outputs, attributes))
        table[getattr(torch.ops.roundexport, name).default] = _translation(operator, len(inputs), tuple(attributes))
    return table


def _translation(operator: Any, tensors: int, attributes: tuple[str, ...]) -> Any:
    """A function of the placeholder's positional arguments: tensors first, then attributes."""

    def translated(*args: Any) -> Any:
        named = dict(zip(attributes, args[tensors:], strict=True))
        return operator(*args[:tensors], **{k: int(v) if isinstance(v, bool) else v for k, v in named.items()})

    return translated


def _schema(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], attributes: dict[str, Any]) -> Any:
    kind = onnx.defs.OpSchema
    optional = kind.FormalParameterOption.Optional
    single = kind.FormalParameterOption.Single
    return kind(
        name,
        PLACEHOLDER,
        1,
        inputs=[kind.FormalParameter(i, "T", param_option=optional if i in _MAY_LACK else single) for i in inputs],
        outputs=[kind.FormalParameter(o, "T") for o in outputs],
        attributes=[kind.Attribute(key, of) for key, of in attributes.items()],
        type_constraints=[("T", ["tensor(float)", "tensor(int64)", "tensor(bool)"], "any")],
    )


def _name_axes(graph: ir.Graph, captured: Capture) -> None:
    """Call the dynamic axes by name in every shape; torch gives each input's axes symbols of their own."""
    symbols: dict[str, str] = {}
    for value in graph.inputs:
        for dim, name in zip(value.shape, _axes(value, captured), strict=False):
            if not isinstance(dim, int):
                symbols[str(dim.value)] = name
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, symbols)) + r")\b")
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, pattern, symbols) for dim in value.shape])


def _axes(value: ir.Value, captured: Capture) -> tuple[str, ...]:
    """Names of an input's axes; those of fixed axes are not used."""
    named: dict[str, tuple[str, ...]] = {
        "attention_mask": (BATCH, TOTAL if captured.task == "generate" else NEW),
        halves.PAST: (PAST,),
        halves.MASK: (BATCH, SOURCE),
        halves.SPEECH: (BATCH, "mel_bins", "frames"),
    }
    if value.name.startswith("past_key_values."):
        return BATCH, "heads", SOURCE, "width"
    return named.get(value.name, (BATCH, NEW))


def _renamed(dim: Any, pattern: re.Pattern[str], symbols: dict[str, str]) -> Any:
    if isinstance(dim, int) or dim.value is None:
        return dim
    return pattern.sub(lambda found: symbols[found.group()], str(dim.value))
