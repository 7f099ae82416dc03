"""Files of a package that reads pictures for onnxruntime-genai's pipeline of Qwen-VL models.

    genai_processor.json     a picture becomes patches: resized to whole patches, scaled, normalized, cut
    genai_vision.onnx        patches [N, C·T·P·P], image_grid_thw [1, 3]   ──▶ image_features [N/m², F]
    genai_embeddings.onnx    input_ids [B, S], image_features              ──▶ inputs_embeds [B, S, F]
    genai_config.json        which is which; positions of three axes are the library's own

The two graphs are vision_encoder.onnx and embed_tokens.onnx with some nodes in front or behind, and read the same data
files.  A list of patches is put together to the picture again that our vision graph reads: neighbors that are merged
stand together in it, square by square, and a still picture fills all T frames of a patch, of which one is taken.
Rows of pictures are scattered among those of the tokens, behind which zeros stand where features are wider (DeepStack).

Source: multi_modal.cpp, qwen2_5_vl_image_processor.cpp, position_inputs.cpp of onnxruntime-genai 0.18.
Limits: it knows these families only by the word <|vision_start|>, and runs pictures one by one.  SmolVLM, Idefics3 and
LLaVA are none of its model types, and no type of its own fits them (docs/decisions/0054).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from roundexport.formats.package import PackageManifest
from roundexport.types import EMBEDS, KERNELS

from .client import write_genai_config
from .settings import ONNXRUNTIME, ROWS_FILE, VISION_FILE, OnnxSettings

_TYPES = {"qwen2_vl": "qwen2_5_vl", "qwen2_5_vl": "qwen2_5_vl", "qwen3_vl": "qwen3_vl"}
"""model_type of a checkpoint -> the library's type, which of stills asks for the same."""
VISION_GRAPH, ROWS_GRAPH, PROCESSOR = "genai_vision.onnx", "genai_embeddings.onnx", "genai_processor.json"
_START = "<|vision_start|>"
_PATCHES, _GRID, _FEATURES = "patches", "image_grid_thw", "image_features"
_CHANNELS = 3


def write_vision_client(out: Path, language: PackageManifest, pictures: PackageManifest) -> None:
    """Write the files above, where the library reads pictures of such a model.

    Args:
        out: folder of a joined package, both parts' files included.
        language: manifest of the language model.
        pictures: manifest of the image side.
    """
    from roundexport.runtime.images import FILE, Area, read_preprocessor
    from roundexport.runtime.tokenizer import read_json

    config = read_json(out / "config.json")
    kind = _TYPES.get(str(config.get("model_type")))
    if kind is None or language.settings.get("dialect") != ONNXRUNTIME:
        return
    start = _token(out, _START)
    prepared = read_json(out / FILE)
    processor = read_preprocessor(prepared, str(out / FILE))
    patch, merge = int(prepared["patch_size"]), int(prepared["merge_size"])
    frames = int(prepared.get("temporal_patch_size", 2))
    if start is None or not isinstance(processor.size, Area):
        return
    _save(_vision_graph(out / VISION_FILE, patch, merge, frames), out / VISION_GRAPH)
    _save(_rows_graph(out / ROWS_FILE, int(config["image_token_id"]), pictures.hidden_size), out / ROWS_GRAPH)
    area = processor.size
    sizes = {"smart_resize": 1, "min_pixels": area.least, "max_pixels": area.most, "width": patch, "height": patch}
    cut = {"patch_size": patch, "merge_size": merge}
    steps: list[tuple[str, dict[str, Any]]] = [
        ("DecodeImage", {"color_space": "RGB"}),
        ("ConvertRGB", {}),
        ("Resize", {**sizes, **cut}),
        ("Rescale", {"rescale_factor": processor.scale}),
        ("Normalize", {"mean": list(processor.mean), "std": list(processor.deviation), kind: 1}),
        ("PatchImage", {**cut, "temporal_patch_size": frames}),
    ]
    transforms = [{"operation": {"name": name, "type": name, **({"attrs": own} if own else {})}} for name, own in steps]
    _write_json(out / PROCESSOR, {"processor": {"name": f"{kind}_image_processor", "transforms": transforms}})
    text = config.get("text_config") or config
    write_genai_config(
        out,
        kind,
        language.tokens,
        language.kv,
        (EMBEDS, "attention_mask", "position_ids"),
        {
            "vocab_size": language.vocab_size,
            "hidden_size": pictures.hidden_size,  # of a row, which may be wider than the model
            "num_attention_heads": int(text["num_attention_heads"]),
            "max_context": language.max_context,
        },
        OnnxSettings(kernels=any(bool(one.settings.get(KERNELS)) for one in (language, pictures))),
        more={
            "image_token_id": int(config["image_token_id"]),
            "video_token_id": int(config.get("video_token_id", -1)),
            "vision_start_token_id": start,
            "embedding": {
                "filename": ROWS_GRAPH,
                "inputs": {"input_ids": "input_ids", _FEATURES: _FEATURES},
                "outputs": {EMBEDS: EMBEDS},
            },
            "vision": {
                "filename": VISION_GRAPH,
                "config_filename": PROCESSOR,
                "spatial_merge_size": merge,
                "patch_size": patch,
                "inputs": {"pixel_values": _PATCHES, _GRID: _GRID},
                "outputs": {_FEATURES: _FEATURES},
            },
        },
    )


def _token(out: Path, word: str) -> int | None:
    """Id of an added token; None: there is none."""
    from roundexport.runtime.tokenizer import read_json

    added = read_json(out / "tokenizer.json").get("added_tokens", ())
    return next((int(token["id"]) for token in added if token["content"] == word), None)


def _vision_graph(path: Path, patch: int, merge: int, frames: int) -> onnx.ModelProto:
    """The vision graph of a package, reading patches."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    pixels, features = graph.input[0].name, graph.output[0].name
    width = graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    constants: dict[str, Any] = {
        "grid.row": [1], "grid.column": [2], "grid.merge": [merge], "grid.patch": [patch], "grid.frame": 0,
        "grid.rest": [merge, merge, _CHANNELS, frames, patch, patch], "grid.picture": [1, _CHANNELS],
        "grid.flat": [-1], "grid.features": [-1, width],
    }  # fmt: skip
    front = [
        helper.make_node("Reshape", [_GRID, "grid.flat"], ["grid.sizes"]),
        helper.make_node("Gather", ["grid.sizes", "grid.row"], ["grid.rows"]),
        helper.make_node("Gather", ["grid.sizes", "grid.column"], ["grid.columns"]),
        helper.make_node("Div", ["grid.rows", "grid.merge"], ["grid.rows_merged"]),
        helper.make_node("Div", ["grid.columns", "grid.merge"], ["grid.columns_merged"]),
        helper.make_node("Concat", ["grid.rows_merged", "grid.columns_merged", "grid.rest"], ["grid.cut"], axis=0),
        helper.make_node("Reshape", [_PATCHES, "grid.cut"], ["grid.squares"]),
        helper.make_node("Gather", ["grid.squares", "grid.frame"], ["grid.still"], axis=5),
        helper.make_node("Transpose", ["grid.still"], ["grid.lines"], perm=[4, 0, 2, 5, 1, 3, 6]),
        helper.make_node("Mul", ["grid.rows", "grid.patch"], ["grid.height"]),
        helper.make_node("Mul", ["grid.columns", "grid.patch"], ["grid.width"]),
        helper.make_node("Concat", ["grid.picture", "grid.height", "grid.width"], ["grid.shape"], axis=0),
        helper.make_node("Reshape", ["grid.lines", "grid.shape"], [pixels]),
    ]
    back = helper.make_node("Reshape", [features, "grid.features"], [_FEATURES])
    _replace(graph.node, [*front, *graph.node, back])
    graph.initializer.extend(_integers(constants))
    wide = _CHANNELS * frames * patch * patch
    inputs = {_PATCHES: (TensorProto.FLOAT, ["patches", wide]), _GRID: (TensorProto.INT64, [1, 3])}
    _replace(graph.input, [helper.make_tensor_value_info(name, *given) for name, given in inputs.items()])
    _replace(graph.output, [helper.make_tensor_value_info(_FEATURES, TensorProto.FLOAT, ["features", width])])
    return model


def _rows_graph(path: Path, image: int, width: int) -> onnx.ModelProto:
    """The graph of a package's table of tokens, taking in rows of pictures."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    table = graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    ids, rows = graph.input[0].name, f"{graph.output[0].name}.tokens"
    for node in graph.node:
        _replace(node.output, [rows if name == graph.output[0].name else name for name in node.output])
    constants: dict[str, Any] = {"pictures.image": image, "pictures.zeros": [0, 0, 0, 0, 0, width - table]}
    own = [
        helper.make_node("Equal", [ids, "pictures.image"], ["pictures.where"]),
        helper.make_node("NonZero", ["pictures.where"], ["pictures.places"]),
        helper.make_node("Transpose", ["pictures.places"], ["pictures.indices"], perm=[1, 0]),
        helper.make_node("Pad", [rows, "pictures.zeros"], ["pictures.rows"]),
        helper.make_node("ScatterND", ["pictures.rows", "pictures.indices", _FEATURES], [EMBEDS]),
    ]
    graph.node.extend(own)
    graph.initializer.extend(_integers(constants))
    graph.input.append(helper.make_tensor_value_info(_FEATURES, TensorProto.FLOAT, ["features", width]))
    shape = [axis.dim_param or axis.dim_value for axis in graph.input[0].type.tensor_type.shape.dim]
    _replace(graph.output, [helper.make_tensor_value_info(EMBEDS, TensorProto.FLOAT, [*shape, width])])
    return model


def _replace(field: Any, values: list[Any]) -> None:
    """Put other values into a repeated field."""
    del field[:]
    field.extend(values)


def _integers(values: dict[str, Any]) -> list[TensorProto]:
    return [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in values.items()]


def _save(model: onnx.ModelProto, path: Path) -> None:
    path.write_bytes(model.SerializeToString())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=4) + "\n", encoding="utf-8")
