"""Toy packages for the runtime's tests: graphs of a few nodes that keep the contracts of both targets.

The decoders have random weights, two attention layers with grouped heads and a byte-level tokenizer; the encoders are
one embedding with a product.  Built by hand, so that the runtime is tested without the exporters.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from conftest import TEXT
from roundexport.formats.package import PackageManifest, write_manifest

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD, LAYERS, CONTEXT = 320, 32, 4, 2, 16, 2, 640
EOS, PAD = 0, 1


def _random(seed: int) -> Any:
    generator = np.random.default_rng(seed)
    return lambda *shape, size=0.3: (generator.standard_normal(shape) * size).astype(np.float32)


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE with <eos> 0 and <pad> 1; any UTF-8 text can be written with its tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT[:20_000]], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def finish(folder: Path, target: str, task: str, model_file: str, **changes: Any) -> Path:
    """Add the tokenizer and the manifest."""
    write_tokenizer(folder)
    heads = {"num_kv_heads": KV_HEADS, "head_dim": HEAD}
    values: dict[str, Any] = {
        "target": target,
        "task": task,
        "model_file": model_file,
        "model_type": "toy",
        "kv": tuple({"layer": i, **heads} for i in range(LAYERS)) if task == "generate" else (),
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "max_context": CONTEXT,
        "tokens": {"bos": None, "eos": (EOS,), "pad": PAD},
        "pooling": {"mode": "mean", "normalize": True} if task == "embed" else None,
        "settings": {},
        "source": {"location": "toy", "digest": "0" * 64, "artifact": "0" * 64, "calibration": {}},
        "layers": {},
        "kept_float": (),
        "fusions": {},
        "versions": {},
    }
    write_manifest(folder, PackageManifest(**{**values, **changes}))
    return folder


def onnx_decoder(
    folder: Path,
    *,
    position_ids: bool = False,
    logits_start: bool = False,
    states: bool = False,
    head_bits: int | None = None,
    head_block: int = 32,
    accuracy_level: int = 4,
    **changes: Any,
) -> Path:
    """A decoder of two GroupQueryAttention layers.

    Args:
        folder: where to write.
        position_ids: give the graph that input.
        logits_start: give the graph that overridable initializer.
        states: a short convolution and linear attention in front of the layers.
        head_bits: make the last product a MatMulNBits.
        head_block: its block size.
        accuracy_level: of that node; 4 rounds activations to int8.
        **changes: manifest fields.
    """
    import onnx
    from onnx import TensorProto, helper

    folder.mkdir(parents=True, exist_ok=True)
    random, graph = _random(0), _OnnxGraph()
    angles = np.outer(np.arange(CONTEXT), 1 / 10000 ** (np.arange(0, HEAD, 2) / HEAD)).astype(np.float32)
    graph.constant("cos", np.cos(angles))
    graph.constant("sin", np.sin(angles))
    graph.constant("one", np.array(1))
    graph.constant("axis", np.array([1]))
    graph.node("ReduceSum", ["attention_mask", "axis"], "sums", keepdims=0)
    graph.node("Sub", ["sums", "one"], "last")
    graph.node("Cast", ["last"], "seqlens", to=TensorProto.INT32)
    graph.node("Shape", ["attention_mask"], "mask_shape")
    graph.node("Gather", ["mask_shape", "one"], "total64")
    graph.node("Cast", ["total64"], "total", to=TensorProto.INT32)
    graph.constant("table", random(VOCAB, HIDDEN, size=1.0))
    graph.node("Gather", ["table", "input_ids"], "embedded" if states else "x0")
    if states:
        from state_toys import onnx_states

        onnx_states(graph, random, "embedded", "x0")
    for i in range(LAYERS):
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            graph.constant(f"w{part}{i}", random(HIDDEN, heads * HEAD))
            graph.node("MatMul", [f"x{i}", f"w{part}{i}"], f"{part}{i}")
        names = [f"q{i}", f"k{i}", f"v{i}", f"past_key_values.{i}.key", f"past_key_values.{i}.value", "seqlens"]
        names += ["total", "cos", "sin", *(["position_ids"] if position_ids else [])]
        outputs = [f"a{i}", f"present.{i}.key", f"present.{i}.value"]
        attributes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "do_rotary": 1, "domain": "com.microsoft"}
        graph.nodes.append(helper.make_node("GroupQueryAttention", names, outputs, **attributes))
        graph.constant(f"wo{i}", random(HEADS * HEAD, HIDDEN))
        graph.node("MatMul", [f"a{i}", f"wo{i}"], f"o{i}")
        graph.node("Add", [f"x{i}", f"o{i}"], f"x{i + 1}")
        for part in ("key", "value"):
            graph.input(f"past_key_values.{i}.{part}", ["b", KV_HEADS, f"p{i}", HEAD], TensorProto.FLOAT)
            graph.output(f"present.{i}.{part}", ["b", KV_HEADS, f"n{i}", HEAD])
    kept = graph.last_positions(f"x{LAYERS}") if logits_start else f"x{LAYERS}"
    if head_bits is None:
        graph.constant("head", random(HIDDEN, VOCAB))
        graph.node("MatMul", [kept, "head"], "logits")
    else:
        graph.quantized_head(kept, random(HIDDEN, VOCAB), head_bits, head_block, accuracy_level)
    for name in ("input_ids", "attention_mask", *(["position_ids"] if position_ids else [])):
        graph.input(name, ["b", "t" if name == "attention_mask" else "s"], TensorProto.INT64)
    graph.output("logits", ["b", "l", VOCAB])
    onnx.save(graph.model(), str(folder / "model.onnx"))
    return finish(folder, "onnx", "generate", "model.onnx", **changes)


def onnx_encoder(folder: Path, **changes: Any) -> Path:
    """last_hidden_state = table[input_ids] · weight."""
    import onnx
    from onnx import TensorProto

    folder.mkdir(parents=True, exist_ok=True)
    random, graph = _random(2), _OnnxGraph()
    graph.constant("table", random(VOCAB, HIDDEN, size=1.0))
    graph.constant("weight", random(HIDDEN, HIDDEN))
    graph.node("Gather", ["table", "input_ids"], "x")
    graph.node("MatMul", ["x", "weight"], "last_hidden_state")
    graph.input("input_ids", ["b", "s"], TensorProto.INT64)
    graph.output("last_hidden_state", ["b", "s", HIDDEN])
    onnx.save(graph.model(), str(folder / "model.onnx"))
    return finish(folder, "onnx", "embed", "model.onnx", **changes)


def onnx_ranker(folder: Path, **changes: Any) -> Path:
    """logits [b, 1] = the sum of table[input_ids], in which padding counts nothing."""
    import onnx
    from onnx import TensorProto

    folder.mkdir(parents=True, exist_ok=True)
    table, graph = _random(4)(VOCAB, 1), _OnnxGraph()
    table[PAD] = 0
    graph.constant("table", table)
    graph.constant("axis", np.array([1], np.int64))
    graph.node("Gather", ["table", "input_ids"], "x")
    graph.node("ReduceSum", ["x", "axis"], "logits", keepdims=0)
    graph.input("input_ids", ["b", "s"], TensorProto.INT64)
    graph.output("logits", ["b", 1])
    onnx.save(graph.model(), str(folder / "model.onnx"))
    (folder / "config.json").write_text('{"id2label": {"0": "RELEVANT"}}')
    return finish(folder, "onnx", "classify", "model.onnx", **changes)


class _OnnxGraph:
    """Collects nodes, constants, inputs and outputs."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []

    def constant(self, name: str, array: Any) -> None:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.asarray(array), name))

    def node(self, kind: str, inputs: list[str], *outputs: str, **attributes: Any) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, outputs, **attributes))

    def input(self, name: str, shape: list[Any], kind: int) -> None:
        from onnx import helper

        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))

    def output(self, name: str, shape: list[Any]) -> None:
        from onnx import TensorProto, helper

        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def last_positions(self, x: str) -> str:
        from onnx import TensorProto

        self.constant("logits_start", np.array([0]))
        self.constant("end", np.array([2**31 - 1]))
        self.input("logits_start", [1], TensorProto.INT64)
        self.node("Slice", [x, "logits_start", "end", "axis", "axis"], "kept")
        return "kept"

    def quantized_head(self, x: str, weight: Any, bits: int, block: int, accuracy_level: int) -> None:
        k, n = weight.shape
        middle = 2 ** (bits - 1)
        groups = weight.T.reshape(n, k // block, block)
        scales = np.abs(groups).max(-1, keepdims=True) / max(middle - 1, 1)
        codes = np.clip(np.round(groups / scales) + middle, 0, 2 * middle - 1).astype(np.uint8)
        packed = sum(codes[..., i :: 8 // bits] << (bits * i) for i in range(8 // bits))
        self.constant("codes", np.asarray(packed, np.uint8))
        self.constant("scales", scales[..., 0].astype(np.float32))
        attributes = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": accuracy_level}
        self.node("MatMulNBits", [x, "codes", "scales"], "logits", domain="com.microsoft", **attributes)

    def model(self) -> Any:
        from onnx import helper

        graph = helper.make_graph(self.nodes, "toy", self.inputs, self.outputs, self.constants)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def ov_decoder(folder: Path, *, states: bool = False, **changes: Any) -> Path:
    """A stateful decoder of two scaled-dot-product attention layers with learned positions.

    Args:
        folder: where to write.
        states: a short convolution and a running sum in front of the layers.
        **changes: manifest fields.
    """
    import openvino as ov
    import openvino.opset15 as op

    folder.mkdir(parents=True, exist_ok=True)
    random = _random(1)
    inputs = {
        name: op.parameter([-1, -1], np.int64, name=name) for name in ("input_ids", "attention_mask", "position_ids")
    }
    inputs["beam_idx"] = op.parameter([-1], np.int32, name="beam_idx")
    for name, node in inputs.items():
        node.output(0).get_tensor().set_names({name})
    x = op.gather(op.constant(random(VOCAB, HIDDEN, size=1.0)), inputs["input_ids"], _index(0))
    x = op.add(x, op.gather(op.constant(random(CONTEXT, HIDDEN)), inputs["position_ids"], _index(0)))
    mask = _ov_mask(inputs["attention_mask"], inputs["input_ids"])
    sinks: list[Any] = []
    if states:
        from state_toys import ov_states

        x = ov_states(x, random, inputs, sinks)
    for i in range(LAYERS):
        q = _ov_heads(x, random(HIDDEN, HEADS * HEAD), HEADS)
        k, v = (
            _ov_cached(f"{i}.{part}", _ov_heads(x, random(HIDDEN, KV_HEADS * HEAD), KV_HEADS), inputs, sinks)
            for part in ("key", "value")
        )
        scale = op.constant(np.float32(HEAD**-0.5))
        found = op.scaled_dot_product_attention(q, k, v, mask, scale, causal=False)
        found = op.reshape(op.transpose(found, _index([0, 2, 1, 3])), _index([0, 0, HEADS * HEAD]), True)
        x = op.add(x, op.matmul(found, op.constant(random(HEADS * HEAD, HIDDEN)), False, False))
    result = op.result(op.matmul(x, op.constant(random(VOCAB, HIDDEN)), False, True))
    result.output(0).get_tensor().set_names({"logits"})
    model = ov.Model([result], sinks, list(inputs.values()), "toy")
    ov.save_model(model, str(folder / "openvino_model.xml"), compress_to_fp16=False)
    return finish(folder, "openvino", "generate", "openvino_model.xml", **changes)


def ov_encoder(folder: Path, **changes: Any) -> Path:
    """last_hidden_state = table[input_ids] · weight."""
    import openvino as ov
    import openvino.opset15 as op

    folder.mkdir(parents=True, exist_ok=True)
    random = _random(2)
    ids = op.parameter([-1, -1], np.int64, name="input_ids")
    ids.output(0).get_tensor().set_names({"input_ids"})
    x = op.gather(op.constant(random(VOCAB, HIDDEN, size=1.0)), ids, _index(0))
    result = op.result(op.matmul(x, op.constant(random(HIDDEN, HIDDEN)), False, False))
    result.output(0).get_tensor().set_names({"last_hidden_state"})
    ov.save_model(ov.Model([result], [ids], "toy"), str(folder / "openvino_model.xml"), compress_to_fp16=False)
    return finish(folder, "openvino", "embed", "openvino_model.xml", **changes)


def _index(values: Any) -> Any:
    import openvino.opset15 as op

    return op.constant(np.array(values, np.int64))


def _ov_mask(mask: Any, ids: Any) -> Any:
    import openvino.opset15 as op

    total = op.gather(op.shape_of(mask, "i64"), _index(1), _index(0))
    new = op.gather(op.shape_of(ids, "i64"), _index(1), _index(0))
    keys = op.unsqueeze(op.range(_index(0), total, _index(1), "i64"), _index(0))
    queries = op.unsqueeze(op.range(op.subtract(total, new), total, _index(1), "i64"), _index(1))
    causal = op.unsqueeze(op.less_equal(keys, queries), _index([0, 1]))
    valid = op.unsqueeze(op.greater(mask, _index(0)), _index([1, 2]))
    return op.select(op.logical_and(causal, valid), op.constant(np.float32(0)), op.constant(np.float32(-65504)))


def _ov_heads(x: Any, weight: Any, heads: int) -> Any:
    import openvino.opset15 as op

    split = op.reshape(op.matmul(x, op.constant(weight), False, False), _index([0, 0, heads, HEAD]), True)
    return op.transpose(split, _index([0, 2, 1, 3]))


def _ov_state(name: str, shape: tuple[int, ...], inputs: dict[str, Any], growing: bool = False) -> tuple[Any, Any]:
    """A state [B, …] as it was, and its variable; one that grows does so along axis 2, from nothing."""
    import openvino as ov
    import openvino.opset15 as op
    from openvino.op.util import Variable, VariableInfo

    info = VariableInfo()
    info.data_shape = ov.PartialShape([-1, *(-1 if growing and axis == 1 else size for axis, size in enumerate(shape))])
    info.data_type = ov.Type.f32
    info.variable_id = name
    variable = Variable(info)
    batch = op.gather(op.shape_of(inputs["input_ids"], "i64"), _index([0]), _index(0))
    whole = op.concat([batch, *(_index([size]) for size in shape)], 0)
    past = op.read_value(op.broadcast(op.constant(np.float32(0)), whole), variable)
    return op.gather(past, inputs["beam_idx"], _index(0)), variable


def _ov_cached(name: str, new: Any, inputs: dict[str, Any], sinks: list[Any]) -> Any:
    """Past and new keys or values, as many as query heads; the state is updated by the sink."""
    import openvino.opset15 as op

    past, variable = _ov_state(f"past_key_values.{name}present.{name}", (KV_HEADS, 0, HEAD), inputs, growing=True)
    both = op.concat([past, new], 2)
    sinks.append(op.assign(both, variable))
    size = op.shape_of(both, "i64")
    axes = [op.gather(size, _index([axis]), _index(0)) for axis in range(4)]
    wide = op.concat([axes[0], axes[1], _index([HEADS // KV_HEADS]), axes[2], axes[3]], 0)
    repeated = op.broadcast(op.unsqueeze(both, _index(2)), wide, broadcast_spec="BIDIRECTIONAL")
    return op.reshape(repeated, _index([0, HEADS, -1, HEAD]), True)


KINDS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "ort": (onnx_decoder, {}),
    "ort-positions": (onnx_decoder, {"position_ids": True}),
    "ort-last-logits": (onnx_decoder, {"logits_start": True}),
    "ort-int4": (onnx_decoder, {"head_bits": 4}),
    "ov": (ov_decoder, {}),
}
WITH_STATES: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "ort-states": (onnx_decoder, {"states": True}),
    "ov-states": (ov_decoder, {"states": True}),
}
