"""Ports by which openvino_genai hands on what Qwen3-VL adds behind its blocks (DeepStack); nobody reads them here.

    language model   visual_pos_masks [B, S], deepstack_visual_embeds [K, T, W]     inputs that no node reads
    merger           deepstack_feature_lists [K, T, W]                              zeros

Here those features stand behind the vectors, W = (1 + K) · H (graph/stages.py), in whatever width the pipeline copies
rows of pictures among those of tokens; so they arrive without the ports.  It asks for the ports all the same, and steps
through the list in rows as wide as `inputs_embeds`.

Source: src/cpp/src/visual_language/qwen3_vl and continuous_batching/model_runner.hpp of openvino_genai 2026.4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import openvino as ov
from openvino import opset15 as ops

from roundexport.types import EMBEDS

from .graph import dimension, integers, scalar

if TYPE_CHECKING:
    from roundexport.graph.capture import Capture

MASKS, FEATURES, LISTS = "visual_pos_masks", "deepstack_visual_embeds", "deepstack_feature_lists"


def add_ports(model: ov.Model, captured: Capture) -> None:
    """Add them where features are added behind blocks.

    Args:
        model: the lowered program.
        captured: the program.
    """
    if captured.stage == "language":
        width, config = model.input(EMBEDS).partial_shape[-1], captured.config.get_text_config()
        if width.get_length() > config.hidden_size:
            for name, kind, rank in ((MASKS, ov.Type.boolean, 2), (FEATURES, ov.Type.f32, 3)):
                parameter = ops.parameter([-1] * rank, kind, name=name)
                parameter.output(0).get_tensor().set_names({name})
                model.add_parameters([parameter])
    elif captured.stage == "merger":
        features = model.output(0).get_node().input_value(0)
        width = features.get_partial_shape()[-1].get_length()
        deep = width // captured.config.vision_config.out_hidden_size - 1
        if deep:
            shape = ops.concat([integers(deep), dimension(features, 0), integers(width)], 0)
            result = ops.result(ops.broadcast(scalar(0.0), shape))
            result.input_value(0).get_tensor().set_names({LISTS})
            model.add_results([result])
