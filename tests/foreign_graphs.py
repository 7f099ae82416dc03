"""Float graphs as other exporters leave them, built by hand from a tiny Llama's weights: every form in one graph.

    hidden = embed_tokens[ids]
    logits = [q k v of hidden, o of q, up · gate of hidden through down, lm_head of hidden], side by side

Embedding in float32; q, k and v below each other, [K, N]; o [N, K] through a Transpose; gate in float16 through a Cast;
up in bfloat16 through a Cast; down in a Gemm with transB and a bias; lm_head [N, K] turned.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import openvino as ov
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from openvino import opset15 as ops

from roundexport.model.checkpoint import Checkpoint
from roundexport.rewriting.matching import as_stored

BLOCK = "model.layers.0"


def weights(model: Path) -> dict[str, NDArray[np.float32]]:
    """Float weights by their last name."""
    checkpoint = Checkpoint.open(model)
    names = [name for name in checkpoint.names() if name.endswith("proj.weight")]
    names += ["model.embed_tokens.weight", "lm_head.weight"]
    return {name.split(".")[-2]: checkpoint.float32(name) for name in names}


def onnx_graph(model: Path, path: Path, opset: int = 21, external: bool = True) -> Path:
    """The graph as ONNX."""
    w = weights(model)
    width = w["o_proj"].shape[0]
    packed = np.ascontiguousarray(np.concatenate([w["q_proj"], w["k_proj"], w["v_proj"]]).T)
    bias = np.linspace(-1, 1, width).astype(np.float32)
    brain = TensorProto(name="up", dims=w["up_proj"].shape, data_type=TensorProto.BFLOAT16)
    brain.raw_data = as_stored(w["up_proj"], np.dtype(np.uint16)).tobytes()
    arrays = {
        "embed": w["embed_tokens"], "packed": packed, "o": w["o_proj"], "gate": w["gate_proj"].astype(np.float16),
        "down": w["down_proj"], "bias": bias, "flat": np.array([-1, w["down_proj"].shape[1]]), "head": w["lm_head"],
        "sizes": np.array([len(w[name]) for name in ("q_proj", "k_proj", "v_proj")]),
    }  # fmt: skip
    make = helper.make_node
    nodes = [
        make("Gather", ["embed", "input_ids"], ["hidden"], name="/embed"),
        make("MatMul", ["hidden", "packed"], ["qkv"], name="/qkv"),
        make("Split", ["qkv", "sizes"], ["q", "k", "v"], axis=-1),
        make("Transpose", ["o"], ["o_t"], perm=[1, 0]),
        make("MatMul", ["q", "o_t"], ["attended"], name="/o"),
        make("Cast", ["gate"], ["gate_32"], to=TensorProto.FLOAT),
        make("Transpose", ["gate_32"], ["gate_t"], perm=[1, 0]),
        make("MatMul", ["hidden", "gate_t"], ["gated"], name="/gate"),
        make("Cast", ["up"], ["up_32"], to=TensorProto.FLOAT),
        make("Transpose", ["up_32"], ["up_t"], perm=[1, 0]),
        make("MatMul", ["hidden", "up_t"], ["upped"], name="/up"),
        make("Tanh", ["upped"], ["bent"]),
        make("Mul", ["gated", "bent"], ["mixed"]),
        make("Reshape", ["mixed", "flat"], ["rows"]),
        make("Gemm", ["rows", "down", "bias"], ["downed"], transB=1, name="/down"),
        make("Transpose", ["head"], ["head_t"], perm=[1, 0]),
        make("MatMul", ["attended", "head_t"], ["logits"], name="/head"),
    ]
    shapes = {name: ["batch", "sequence", None] for name in ("logits", "k", "v")} | {"downed": ["rows", width]}
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        outputs,
        [*(numpy_helper.from_array(values, name) for name, values in arrays.items()), brain],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(made, path, save_as_external_data=external, location=f"{path.name}_data", size_threshold=1024)
    return path


def openvino_graph(model: Path, path: Path) -> Path:
    """The graph as OpenVINO has it: float16 behind a Convert, one turned, one packed, one in bfloat16."""
    w = weights(model)
    ids = ops.parameter([-1, -1], ov.Type.i64, name="input_ids")
    ids.output(0).get_tensor().set_names({"input_ids"})

    def half(values: NDArray[np.float32]) -> ov.Node:
        return ops.convert(ops.constant(values.astype(np.float16)), "f32")

    brain = ov.Tensor(ov.Type.bf16, ov.Shape(list(w["up_proj"].shape)))
    brain.data.view(np.uint16)[...] = as_stored(w["up_proj"], np.dtype(np.uint16))
    packed = np.concatenate([w["q_proj"], w["k_proj"], w["v_proj"]])
    hidden = ops.gather(half(w["embed_tokens"]), ids, ops.constant(np.int64(0)))
    qkv = ops.matmul(hidden, half(packed), False, True)
    sizes = ops.constant(np.array([len(w[name]) for name in ("q_proj", "k_proj", "v_proj")]))
    q, k, v = ops.variadic_split(qkv, -1, sizes).outputs()
    attended = ops.matmul(q, ops.constant(np.ascontiguousarray(w["o_proj"].T)), False, False)
    gated = ops.matmul(hidden, ops.constant(w["gate_proj"]), False, True)
    upped = ops.matmul(hidden, ops.convert(ov.op.Constant(brain, False), "f32"), False, True)
    downed = ops.matmul(ops.multiply(gated, ops.tanh(upped)), half(w["down_proj"]), False, True)
    logits = ops.matmul(attended, half(w["lm_head"]), False, True)
    results = []
    for name, value in {"logits": logits, "k": k, "v": v, "downed": downed}.items():
        results.append(ops.result(value))
        results[-1].output(0).get_tensor().set_names({name})
    ov.save_model(ov.Model(results, [ids], "foreign"), path, compress_to_fp16=False)
    return path
