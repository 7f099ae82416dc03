"""Outputs of a rewritten graph held against the float graph whose constants are the integers' floats.

Both run on their runtime in float32, on the same made-up inputs, and all outputs are compared:

    difference = max |rewritten − float| / std(float)        over each output; the largest counts

Stateful OpenVINO graphs are run twice, so that the second run reads what the first one left.  Both sides sum in float32
in another order, so small graphs show 1e-6; a thousandth is allowed, as for packages (targets/output_check.py), and
fifty where the graph itself computes in float16 or bfloat16, whose rounding of every step neither side shares.

That alone would not see a weight put in the wrong way round if both sides did it: the float side is made by changing
the constant itself, in its own place and orientation, and knows nothing of how the reader was replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import UnsupportedError

from .feeds import SIZES, Feeds, Port, Sizes, effective, made_up

TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2

Run = Callable[[Feeds], dict[str, NDArray[Any]]]
Open = Callable[[Path], tuple[Sequence[Port], Run]]


@dataclass(frozen=True)
class Comparison:
    """How far a rewritten graph's outputs are from the float graph's with the dequantized weights.

    Args:
        difference: the largest, relative to the standard deviation of its output.
        output: at which output.
        tolerance: what is allowed.
        outputs: how many were compared.
        sizes: rows, new tokens and cached tokens of the inputs.
        engine: the runtime and its version.
    """

    difference: float
    output: str
    tolerance: float
    outputs: int
    sizes: Sizes
    engine: str

    def __str__(self) -> str:
        return (
            f"{self.outputs} outputs within {self.difference:.1e} standard deviations of the graph with dequantized "
            f"weights in float32 ({self.sizes.batch} rows, {self.sizes.new} tokens behind {self.sizes.past}, "
            f"{self.engine})"
        )


def compare(rewritten: Path, reference: Path, vocab: int, given: Mapping[str, NDArray[Any]], half: bool) -> Comparison:
    """Run both graphs and compare.

    Args:
        rewritten: the graph with the integers.
        reference: the graph with their floats.
        vocab: token ids are below this.
        given: inputs of the user.
        half: whether the graph computes in 16 bits.

    Raises:
        UnsupportedError: the outputs differ, or no inputs were found with which the float graph runs.
    """
    open_graph, engine = _runtime(rewritten)
    ports, run = open_graph(reference)
    sizes, feeds, expected = _first_that_runs(ports, run, vocab, given)
    del run
    found = open_graph(rewritten)[1](feeds)
    worst, where = max((_apart(found[name], values), name) for name, values in expected.items())
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    if not worst <= tolerance:
        raise UnsupportedError(
            f"the rewritten graph is wrong and is not kept: on {engine} its output {where} is {worst:.3g} standard "
            f"deviations away from that of the float graph with dequantized weights (allowed: {tolerance:.1g})"
        )
    return Comparison(worst, where, tolerance, len(expected), sizes, engine)


def _first_that_runs(
    ports: Sequence[Port], run: Run, vocab: int, given: Mapping[str, NDArray[Any]]
) -> tuple[Sizes, Feeds, dict[str, NDArray[Any]]]:
    errors = []
    for sizes in SIZES:
        try:
            feeds = made_up(ports, sizes, vocab, given)
            outputs = {name: values for name, values in run(feeds).items() if values.dtype.kind == "f"}
        except (RuntimeError, ValueError) as error:
            errors.append(" ".join(str(error).split())[:200])
            continue
        except Exception as error:  # ONNX Runtime's own errors share no base class
            errors.append(" ".join(str(error).split())[:200])
            continue
        if any(values.size and np.isfinite(values).all() for values in outputs.values()):
            return effective(ports, sizes), feeds, outputs
    wanted = ", ".join(f"{port.name} {port.dtype}{list(port.shape)}" for port in ports)
    raise UnsupportedError(
        f"the float graph runs with none of the inputs that were made up for it ({errors[0] if errors else 'no output'}"
        f"); give some with --inputs FILE.npz, by name: {wanted}"
    )


def _apart(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Largest difference, in standard deviations of what is wanted."""
    if found.shape != wanted.shape:
        return np.inf
    if not wanted.size:
        return 0.0
    spread = float(wanted.astype(np.float64).std()) or 1.0
    apart = float(np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max()) / spread
    return apart if np.isfinite(apart) else np.inf


def _runtime(graph: Path) -> tuple[Open, str]:
    if graph.suffix == ".xml":
        import openvino as ov

        return _open_openvino, f"openvino {ov.__version__.partition('-')[0]}"
    import onnxruntime as ort

    return _open_onnx, f"onnxruntime {ort.__version__}"


_ORT_TYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(int64)": "int64",
    "tensor(int32)": "int32", "tensor(bool)": "bool",
}  # fmt: skip


def _open_onnx(path: Path) -> tuple[Sequence[Port], Run]:
    import onnxruntime as ort

    from roundexport.runtime.engines._ort_levels import with_int8_activations

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    model = with_int8_activations(path.read_bytes())
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class
        raise UnsupportedError(f"{path.name}: ONNX Runtime {ort.__version__} refuses the graph: {error}") from error
    ports = [
        Port(port.name, tuple(dim if isinstance(dim, int) else None for dim in port.shape), _ORT_TYPES[port.type])
        for port in session.get_inputs()
    ]
    names = [port.name for port in session.get_outputs()]
    return ports, lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))


def _open_openvino(path: Path) -> tuple[Sequence[Port], Run]:
    import openvino as ov

    exact = {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    compiled = ov.Core().compile_model(path, "CPU", exact)
    ports = [
        Port(
            port.get_any_name(),
            tuple(None if dim.is_dynamic else dim.get_length() for dim in port.get_partial_shape()),
            np.dtype(port.get_element_type().to_dtype()).name,
        )
        for port in compiled.inputs
    ]
    return ports, lambda feeds: _run_openvino(compiled, feeds)


def _run_openvino(compiled: Any, feeds: Feeds) -> dict[str, NDArray[Any]]:
    request = compiled.create_infer_request()
    found = {}
    stateful = bool(request.query_state())
    for turn in range(2 if stateful else 1):
        if turn:
            feeds = _next(feeds)
        outputs = request.infer(feeds)
        for number, port in enumerate(compiled.outputs):
            name = next(iter(port.get_names()), f"output {number}")
            found[f"{name}{', second run' if turn else ''}"] = np.array(outputs[port])
    return found


def _next(feeds: Feeds) -> Feeds:
    """One token more for every row of a graph that keeps its cache."""
    done = next((values.shape[1] for name, values in feeds.items() if name.endswith("input_ids")), 1)
    more = {}
    for name, values in feeds.items():
        if name.endswith("attention_mask"):
            more[name] = np.ones((len(values), done + 1), values.dtype)
        elif name == "position_ids":
            more[name] = np.full((*values.shape[:-1], 1), done, values.dtype)
        elif name == "beam_idx":
            more[name] = values
        else:
            more[name] = values[:, :1]
    return more
