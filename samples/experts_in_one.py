"""A layer of experts as it is exported (Split, one MatMulNBits per expert, Concat) beside ONNX Runtime's QMoE.

    python samples/experts_in_one.py [--hidden 2048] [--width 768] [--experts 128] [--chosen 8] [--block 32]

Both graphs hold the same random 4-bit weights and get the same tokens, chosen experts and shares; products round
activations to int8 (accuracy_level 4).  They take turns; one thread, its CPU time, medians.  What it said is in
decision 0050.  QMoE's rows of gate and up take turns, and its scores come as a table over all experts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

LENGTHS = {1: 15, 8: 15, 64: 15}  # tokens -> runs
Weight = tuple[np.ndarray, np.ndarray]


class Graph:
    """Nodes and initializers of a graph that is being written."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def add(self, kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> None:
        """One node."""
        self.nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))

    def hold(self, name: str, values: Any) -> str:
        """One initializer."""
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def opened(self, hidden: int, chosen: int) -> ort.InferenceSession:
        """A session of one thread."""
        real, whole = TensorProto.FLOAT, TensorProto.INT64
        kinds = {"x": (real, hidden), "index": (whole, chosen), "share": (real, chosen)}
        inputs = [helper.make_tensor_value_info(name, kind, ["T", size]) for name, (kind, size) in kinds.items()]
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", hidden])
        graph = helper.make_graph(self.nodes, "experts", inputs, [output], self.weights)
        sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=sets, ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def products(given: argparse.Namespace, gates: list[Weight], ups: list[Weight], downs: list[Weight]) -> Graph:
    """Tokens sorted by expert, cut, multiplied, joined, put back."""
    graph, count, size = Graph(), given.experts, (given.hidden, given.width)
    for name, values in (("one", [1]), ("end", [-1]), ("halves", [size[1]] * 2), ("rows", [-1, given.chosen, size[0]])):
        graph.hold(name, np.array(values))
    graph.hold("chosen", np.array(given.chosen))
    graph.hold("numbers", np.arange(count)[:, None])
    graph.add("Reshape", ["index", "end"], ["flat"])
    graph.add("Shape", ["flat"], ["length"])
    graph.add("TopK", ["flat", "length"], ["values", "order"], largest=0)
    graph.add("Equal", ["flat", "numbers"], ["hits"])
    graph.add("Cast", ["hits"], ["whole"], to=TensorProto.INT64)
    graph.add("ReduceSum", ["whole", "one"], ["counts"], keepdims=0)
    graph.add("Div", ["order", "chosen"], ["tokens"])
    graph.add("Gather", ["x", "tokens"], ["sorted"], axis=0)
    both = [
        tuple(np.concatenate(pair) for pair in zip(*of_one, strict=True)) for of_one in zip(gates, ups, strict=True)
    ]
    _each(graph, "sorted", "both", both, size[0], 2 * size[1], given.block)
    graph.add("Split", ["both", "halves"], ["gate", "up"], axis=-1)
    graph.add("Sigmoid", ["gate"], ["opened"])
    graph.add("Mul", ["gate", "opened"], ["active"])
    graph.add("Mul", ["active", "up"], ["inner"])
    _each(graph, "inner", "outer", downs, size[1], size[0], given.block)
    graph.add("TopK", ["order", "length"], ["places", "back"], largest=0)
    graph.add("Gather", ["outer", "back"], ["unsorted"], axis=0)
    graph.add("Reshape", ["unsorted", "rows"], ["apart"])
    graph.add("Unsqueeze", ["share", "end"], ["weights"])
    graph.add("Mul", ["apart", "weights"], ["weighed"])
    graph.add("ReduceSum", ["weighed", "one"], ["y"], keepdims=0)
    return graph


def _each(graph: Graph, x: str, y: str, weights: list[Any], width: int, rows: int, block: int) -> None:
    """One product per expert on its own rows."""
    numbers = range(len(weights))
    graph.add("Split", [x, "counts"], [f"{y}_in{number}" for number in numbers], axis=0)
    for number, (codes, scales) in enumerate(weights):
        inputs = [f"{y}_in{number}", graph.hold(f"{y}_b{number}", codes), graph.hold(f"{y}_s{number}", scales)]
        sizes = {"K": width, "N": rows, "bits": 4, "block_size": block, "accuracy_level": 4}
        graph.add("MatMulNBits", inputs, [f"{y}_out{number}"], "com.microsoft", **sizes)
    graph.add("Concat", [f"{y}_out{number}" for number in numbers], [y], axis=0)


def in_one(given: argparse.Namespace, gates: list[Weight], ups: list[Weight], downs: list[Weight]) -> Graph:
    """QMoE, with shares of the chosen experts in a table over all."""
    graph, rows = Graph(), 2 * given.width
    graph.hold("count", np.array([given.experts]))
    graph.add("Shape", ["index"], ["tokens"], start=0, end=1)
    graph.add("Concat", ["tokens", "count"], ["size"], axis=0)
    graph.add("ConstantOfShape", ["size"], ["zeros"], value=numpy_helper.from_array(np.zeros(1, np.float32)))
    graph.add("ScatterElements", ["zeros", "index", "share"], ["scores"], axis=1)
    turns = [
        [np.stack(pair, 1).reshape(rows, *pair[0].shape[1:]) for pair in zip(gate, up, strict=True)]
        for gate, up in zip(gates, ups, strict=True)
    ]
    graph.hold("w1", np.stack([codes.reshape(rows, -1) for codes, _ in turns]))
    graph.hold("s1", np.stack([scales for _, scales in turns]))
    graph.hold("w2", np.stack([codes.reshape(given.hidden, -1) for codes, _ in downs]))
    graph.hold("s2", np.stack([scales for _, scales in downs]))
    graph.add(
        "QMoE", ["x", "scores", "w1", "s1", "", "w2", "s2", *[""] * 7, "scores"], ["y"], "com.microsoft",
        k=given.chosen, activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
        expert_weight_bits=4, block_size=given.block, accuracy_level=4, normalize_routing_weights=0,
    )  # fmt: skip
    return graph


def main() -> None:
    """Build both, time them in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = (("hidden", 2048), ("width", 768), ("experts", 128), ("chosen", 8), ("block", 32))
    for name, usual in sizes:
        parser.add_argument(f"--{name}", type=int, default=usual)
    given, random = parser.parse_args(), np.random.default_rng(0)

    def weight(rows: int, width: int) -> Weight:
        blocks = width // given.block
        codes = random.integers(0, 256, (rows, blocks, given.block // 2), np.uint8)
        return codes, (random.random((rows, blocks), np.float32) + 0.5) / 400

    shapes = (given.width, given.hidden), (given.width, given.hidden), (given.hidden, given.width)
    weights = [[weight(*shape) for _ in range(given.experts)] for shape in shapes]
    makers = {"products": products, "QMoE": in_one}
    sessions = {name: make(given, *weights).opened(given.hidden, given.chosen) for name, make in makers.items()}
    for length, runs in LENGTHS.items():
        chosen = np.argsort(random.random((length, given.experts)), 1)[:, : given.chosen].astype(np.int64)
        share = random.random((length, given.chosen), np.float32)
        feed = {"x": random.standard_normal((length, given.hidden), np.float32), "index": chosen,
                "share": share / share.sum(1, keepdims=True)}  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in sessions}
        found = {}
        for _ in range(runs):
            for name, session in sessions.items():
                began = time.thread_time()
                found[name] = session.run(None, feed)[0]
                times[name].append(1000 * (time.thread_time() - began))
        apart = np.abs(found["products"] - found["QMoE"]).max() / found["products"].std()
        words = ", ".join(f"{name} {statistics.median(taken):.3f} ms" for name, taken in times.items())
        print(f"{length} tokens: {words}; apart by {apart:.1e} standard deviations", flush=True)


if __name__ == "__main__":
    main()
