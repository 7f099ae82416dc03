"""From a captured program to an OpenVINO model: the front end converts, the rules lower the placeholders.

`openvino.convert_model` translates the model's own arithmetic and calls one rule per placeholder; every rule is a file
of its own, listed in `_RULES`.  Afterwards the state (keys and values, and what else layers carry) and the beam_idx
input are added, and inputs and output get the names that clients look for, as friendly name and as tensor name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
from openvino import opset15 as ops
from openvino.frontend.pytorch import ConversionExtension

from roundexport.errors import RoundexportError, UnsupportedError
from roundexport.targets.weight_source import NoWeights

from . import (
    attention,
    causal_conv,
    deep_stack,
    embedding,
    experts,
    linear,
    linear_attention,
    rms_norm,
    rope,
    tokens_only,
    weighted_average,
)
from .graph import Call, Graph, dimension, integer, integers
from .stable_names import stable_names

if TYPE_CHECKING:
    from roundexport.graph.capture import Capture

_STATES = (causal_conv, linear_attention, weighted_average)
_RULES = (linear, experts, embedding, attention, *_STATES, tokens_only, rope, rms_norm)


def lower(graph: Graph) -> ov.Model:
    """Convert the captured program.

    Args:
        graph: fresh state; filled with what was used, kept float and refused.

    Returns:
        The model, with KV state in a decoder.

    Raises:
        UnsupportedError: an operator of the model has no translation.
    """
    failures: list[Exception] = []
    extensions = [ConversionExtension(rule.PLACEHOLDER, _translator(rule.lower, graph, failures)) for rule in _RULES]
    try:
        with warnings.catch_warnings():
            # torch warns about its own tree specs where programs are copied and decomposed.
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
            model = ov.convert_model(graph.capture.program, extension=extensions)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # the front end's OpConversionFailure derives from Exception alone
        failure = failures[0] if failures else error
        if isinstance(failure, RoundexportError):
            raise failure from error
        raise UnsupportedError(f"OpenVINO cannot convert the captured model: {_reason(failure)}") from failure
    for name, port in zip(graph.capture.inputs, model.inputs, strict=True):
        _name(port, name)
    if graph.capture.stage is not None:
        _keep_sizes(model, graph.capture)
    if graph.sinks:
        model.add_variables(graph.variables)
        model.add_sinks(graph.sinks)
        _add_beam_idx(model)
        _batch_from_tokens(model)
    if graph.capture.half is not None and graph.capture.half.name == "decoder":
        _measure_past(model, graph.shared[attention.PAST])
    _keep_products_of_constants(model)
    for name, port in zip(graph.capture.outputs, model.outputs, strict=True):
        _name(port, name)
    model.validate_nodes_and_infer_types()
    deep_stack.add_ports(model, graph.capture)
    stable_names(model, "roundexport")
    return model


def check(captured: Capture) -> None:
    """Convert the captured program without its weights, for what that refuses.

    Raises:
        UnsupportedError: an operator of the model has no translation, or a rule refuses a placeholder.
    """
    graph = Graph(captured, NoWeights(), "cpu")
    lower(graph)
    graph.release()


def _keep_sizes(model: ov.Model, captured: Capture) -> None:
    """Give inputs the sizes that the program knows, which the front end forgets where one of them is free.

    Runtimes read the width of vectors and the number of angles from an input's shape.
    """
    known = {node.name: node.meta["val"].shape for node in captured.program.graph.nodes if node.op == "placeholder"}
    for name, port in zip(captured.inputs, model.inputs, strict=True):
        sizes = [size if isinstance(size, int) else -1 for size in known[name]]
        port.get_node().set_partial_shape(ov.PartialShape(sizes))


def _batch_from_tokens(model: ov.Model) -> None:
    """Let the batch size be read from the tokens wherever the model reads it from attention_mask.

    Paged attention removes attention_mask, which it can only where nothing but masks depends on it.
    """
    inputs = {port.get_any_name(): port for port in model.inputs}
    if "attention_mask" not in inputs:
        return
    for consumer in inputs["attention_mask"].get_target_inputs():
        if consumer.get_node().get_type_name() != "ShapeOf":
            continue
        for reader in consumer.get_node().output(0).get_target_inputs():
            gather = reader.get_node()
            if gather.get_type_name() == "Gather" and _is_zero(gather.input_value(1).get_node()):
                kind = consumer.get_node().get_output_element_type(0)
                shape = ops.shape_of(model.inputs[0], kind)
                gather.input(0).replace_source_output(shape.output(0))


def _keep_products_of_constants(model: ov.Model) -> None:
    """Let a linear that is applied to a constant (a table of distances) be computed at run time.

    The CPU plugin would compute it while it loads the graph, and cannot with compressed weights.  The constant is
    repeated min(batch, 1) times, which is once.
    """
    live = set[str]()
    for node in model.get_ordered_ops():
        if node.get_type_name() in ("Parameter", "ReadValue") or any(
            node.input_value(port).get_node().get_name() in live for port in range(node.get_input_size())
        ):
            live.add(node.get_name())
        elif node.get_type_name() == "MatMul" and node.input_value(1).get_node().get_type_name() != "Constant":
            once = ops.minimum(dimension(model.inputs[0], 0), integers(1))
            repeats = ops.concat([once, *([integers(1)] * (len(node.input_value(0).get_partial_shape()) - 1))], 0)
            node.input(0).replace_source_output(ops.tile(node.input_value(0), repeats).output(0))


def _measure_past(model: ov.Model, keys: Any) -> None:
    """Put the length of the first layer's cached keys in the place of that of ``past``, and take ``past`` out.

    Raises:
        UnsupportedError: more of it is read than its length.
    """
    past = next(port for port in model.inputs if attention.PAST in port.get_names())
    for reader in list(past.get_target_inputs()):
        node = reader.get_node()
        if node.get_type_name() != "ShapeOf":
            raise UnsupportedError(f"{node.get_friendly_name()}: the decoder reads more of its cache than its length")
        shape = ops.shape_of(keys, node.get_output_element_type(0).get_type_name())
        node.output(0).replace(ops.gather(shape, integers(2), integer(0)).output(0))
    model.remove_parameter(past.get_node())


def _is_zero(node: Any) -> bool:
    return bool(node.get_type_name() == "Constant" and not np.any(node.data))


def _translator(
    rule: Callable[[Graph, Call], list[Any]], graph: Graph, failures: list[Exception]
) -> Callable[[Any], list[Any]]:
    """A front-end callback around a rule that keeps the rule's own error: the front end only passes its text on."""

    def translate(context: Any) -> list[Any]:
        try:
            return rule(graph, Call(context))
        except Exception as error:
            failures.append(error)
            raise

    return translate


def _add_beam_idx(model: ov.Model) -> None:
    """Put the beam_idx input in the place of the node that stands for it."""
    stand_in = next(node for node in model.get_ops() if node.get_friendly_name() == attention.BEAM_IDX)
    stand_in.set_friendly_name("beam_idx_stand_in")
    parameter = ops.parameter([-1], ov.Type.i32, name=attention.BEAM_IDX)
    stand_in.output(0).replace(parameter.output(0))
    model.add_parameters([parameter])
    _name(parameter.output(0), attention.BEAM_IDX)


def _name(port: Any, name: str) -> None:
    port.get_tensor().set_names({name})
    if port.get_node().get_type_name() == "Parameter":
        port.get_node().set_friendly_name(name)


def _reason(error: Exception) -> str:
    """What the front end says, from its summary on, which names the operators, if it has one."""
    lines = [line.strip().removeprefix("-- ") for line in str(error).splitlines() if line.strip()]
    start = lines.index("Summary:") + 1 if "Summary:" in lines else 0
    return "; ".join(lines[start : start + 4])[:400]
