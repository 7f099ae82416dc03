"""The order of the rules: from a captured program to a finished ONNX graph whose weights lie in the data file.

translate ─ tidy ─ attention (rotary inside) ─ states ─ rotary left over ─ cancel reshapes ─ norms, skip norms
    ─ experts ─ merge sibling linears ─ linears of integers ─ linears and embeddings ─ packed q/k/v ─ finish

In the standard dialect (standard/__init__.py) attention, norms, linears and embeddings have rules of their own, and
siblings are not merged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from roundexport.errors import UnsupportedError
from roundexport.graph.capture import Capture
from roundexport.quant.spec import QuantSpec
from roundexport.targets.weight_source import WeightSource

from . import (
    cross_attention,
    decoder_attention,
    encoder_attention,
    experts,
    integer_linears,
    linears,
    merge,
    norms,
    reshapes,
    rope,
    states,
    tidy,
    weighted_average,
)
from .datafile import INLINE_BYTES, DataFile
from .graph import PLACEHOLDER, Editor, Log
from .rotary_tables import RotaryTables
from .settings import DATA_ENDING, INTEGER_INPUTS, MODEL_FILE, ONNXRUNTIME, STANDARD
from .standard import attention as standard_attention
from .standard import linears as standard_linears
from .standard import norms as standard_norms
from .translate import translate


@dataclass(frozen=True)
class Lowered:
    """What lowering gives beside the files it wrote.

    Args:
        log: rules applied and refused.
        forms: artifact layer -> how it is stored, in words.
        used: artifact layers, once for every place they are written.
        float_layers: linears and embeddings in the graph that stayed float.
        inputs: names of the graph's inputs.
    """

    log: Log
    forms: dict[str, str]
    used: tuple[str, ...]
    float_layers: tuple[str, ...]
    inputs: tuple[str, ...]


def joined(parts: Sequence[Lowered]) -> Lowered:
    """What several graphs of one package give together."""
    return Lowered(
        log=Log(
            sum((part.log.fusions for part in parts), Counter()),
            list(dict.fromkeys(one for part in parts for one in part.log.refused)),
        ),
        forms={name: form for part in parts for name, form in part.forms.items()},
        used=tuple(name for part in parts for name in part.used),
        float_layers=tuple(dict.fromkeys(name for part in parts for name in part.float_layers)),
        inputs=parts[-1].inputs,
    )


def lower(
    captured: Capture,
    weights: WeightSource,
    specs: dict[str, QuantSpec],
    out: Path,
    levels: linears.AccuracyLevels,
    max_context: int,
    name: str = MODEL_FILE,
    dialect: str = ONNXRUNTIME,
) -> Lowered:
    """Write a graph and its data file.

    Args:
        captured: the program and its tables.
        weights: integers and floats by module name.
        specs: artifact layer -> scheme.
        out: an existing folder.
        levels: accuracy level of every MatMulNBits.
        max_context: rows of the rotary tables.
        name: of the graph's file.
        dialect: see OnnxSettings.

    Raises:
        UnsupportedError: something in the model has no lowering.
    """
    standard = dialect == STANDARD
    editor = _with_attention(captured, max_context, standard)
    data = DataFile(out / f"{name}{DATA_ENDING}")
    store = linears.LinearStore(editor, captured, weights, specs, data, levels, merges=not standard)
    reshapes.cancel(editor)
    (standard_norms if standard else norms).lower(editor)
    linears.as_lists(editor)
    experts.expand(editor, store)
    if standard:
        standard_linears.lower(editor, store)
    else:
        merge.merge(editor, store)
        if levels.usual == INTEGER_INPUTS:
            integer_linears.lower(editor, store)
        linears.lower(editor, store)
        decoder_attention.pack(editor)
    tidy.finish(editor)
    if editor.log.fusions[integer_linears.RULE]:
        integer_linears.lean(editor)
    _drop_unused_positions(editor)
    _refuse_leftovers(editor)
    if captured.task == "generate" and not standard:
        _note_rotary(editor)
    _externalise(editor, store.data)
    ir.save(editor.model, out / name)
    editor.log.refused.extend(store.slow_layers())
    return Lowered(
        log=editor.log,
        forms=store.forms,
        used=tuple(store.used),
        float_layers=tuple(store.float_layers),
        inputs=tuple(value.name for value in editor.graph.inputs),
    )


def check(captured: Capture) -> None:
    """Lower everything but the weights, for what that refuses; nothing is written.

    Raises:
        UnsupportedError: something in the model has no lowering.
    """
    editor = _with_attention(captured, captured.max_context)
    norms.lower(editor)
    _refuse_leftovers(editor, but=("linear", "grouped_linear", "embedding"))


def _with_attention(captured: Capture, max_context: int, standard: bool = False) -> Editor:
    """The captured program with attention and rotary embeddings lowered."""
    if standard and (captured.states or captured.half is not None):
        raise UnsupportedError(
            "the standard dialect has no form for states of convolutions and linear attention, nor for encoders with a "
            "decoder; take --dialect onnxruntime"
        )
    editor = Editor(translate(captured))
    tidy.tidy(editor)
    tables = None if standard else RotaryTables(editor, captured, max_context)
    if captured.stage == "embedding":
        return editor
    if captured.task == "generate" and tables is None:
        standard_attention.lower(editor, captured)
    elif tables is None:
        encoder_attention.lower(editor, captured, standard)
    elif captured.half is not None and captured.half.name == "decoder":
        cross_attention.lower(editor, captured, tables)
    elif captured.task == "generate":
        decoder_attention.lower(editor, captured, tables)
    else:
        encoder_attention.lower(editor, captured)
    states.lower(editor, captured)
    weighted_average.lower(editor, captured)
    rope.lower(editor, tables)
    return editor


def _drop_unused_positions(editor: Editor) -> None:
    """position_ids goes when nothing reads it any more; clients then do not feed it."""
    for value in list(editor.graph.inputs):
        if value.name == "position_ids" and not value.uses():
            editor.graph.inputs.remove(value)


def _note_rotary(editor: Editor) -> None:
    """Say that angles are still computed in the graph, where no rule has said why."""
    rule = "rotary in attention"
    if editor.nodes("Cos") and not any(name == rule for name, _ in editor.log.refused):
        editor.log.refused.append((rule, "the model turns in a way of its own, which takes plain operators"))


def _refuse_leftovers(editor: Editor, but: tuple[str, ...] = ()) -> None:
    left = sorted({node.op_type for node in editor.graph if node.domain == PLACEHOLDER} - set(but))
    if left:
        raise UnsupportedError(f"the ONNX target has no lowering for: {', '.join(left)}")


def _externalise(editor: Editor, data: DataFile) -> None:
    """Move what is still in memory (norms, rotary tables) and not tiny to the data file."""
    for value in editor.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and not isinstance(tensor, ir.ExternalTensor) and tensor.nbytes >= INLINE_BYTES:
            value.const_value = data.tensor(value.name, tensor.numpy())
