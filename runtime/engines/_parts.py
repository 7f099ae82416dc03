"""Files of the graphs that stand beside a decoder's where it is cut behind its table of tokens.

    rows      input_ids [B, S] ──▶ inputs_embeds [B, S, H]               vision   pixel_values ──▶ features [B, T, H]

Where a tower reads pictures of any size its graphs are three, two without a table of positions; see _grid.py.

Names are those that clients look for: optimum's for ONNX, optimum-intel's and openvino_genai's for OpenVINO.
"""

ROWS = {"onnx": "embed_tokens.onnx", "openvino": "openvino_text_embeddings_model.xml"}
VISION = {"onnx": "vision_encoder.onnx", "openvino": "openvino_vision_embeddings_model.xml"}
MERGER = "openvino_vision_embeddings_merger_model.xml"
POSITIONS = "openvino_vision_embeddings_pos_model.xml"
