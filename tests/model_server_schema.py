"""The messages that a graph.pbtxt of OpenVINO Model Server is made of, for protobuf's own parser of text.

Only what such graphs use, with numbers, types and labels as their owners have them.  Source: calculator.proto,
mediapipe_options.proto and sync_set_input_stream_handler.proto of https://github.com/google-ai-edge/mediapipe;
src/llm/llm_calculator.proto and src/embeddings/embeddings_calculator_ov.proto of
https://github.com/openvinotoolkit/model_server.
"""

from __future__ import annotations

import functools
from typing import Any

from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory, text_format

Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {"string": Field.TYPE_STRING, "bool": Field.TYPE_BOOL, "uint32": Field.TYPE_UINT32}
_SCALARS["uint64"] = Field.TYPE_UINT64
_LABELS = {"": Field.LABEL_OPTIONAL, "*": Field.LABEL_REPEATED, "!": Field.LABEL_REQUIRED}
# Message -> name -> (number, type, label); a type with a dot is a message.
_MESSAGES: dict[str, dict[str, tuple[int, str, str]]] = {
    "CalculatorGraphConfig": {
        "node": (1, ".mediapipe.Node", "*"),
        "input_stream": (10, "string", "*"),
        "output_stream": (15, "string", "*"),
    },
    "Node": {
        "name": (1, "string", ""),
        "calculator": (2, "string", ""),
        "input_stream": (3, "string", "*"),
        "output_stream": (4, "string", "*"),
        "input_side_packet": (5, "string", "*"),
        "node_options": (8, ".google.protobuf.Any", "*"),
        "input_stream_handler": (11, ".mediapipe.InputStreamHandlerConfig", ""),
        "input_stream_info": (13, ".mediapipe.InputStreamInfo", "*"),
    },
    "InputStreamInfo": {"tag_index": (1, "string", ""), "back_edge": (2, "bool", "")},
    "InputStreamHandlerConfig": {
        "input_stream_handler": (1, "string", ""),
        "options": (3, ".mediapipe.MediaPipeOptions", ""),
    },
    "MediaPipeOptions": {},
    "SyncSetInputStreamHandlerOptions": {"sync_set": (1, ".mediapipe.SyncSet", "*")},
    "SyncSet": {"tag_index": (1, "string", "*")},
    "LLMCalculatorOptions": {
        "models_path": (1, "string", "!"),
        "max_num_batched_tokens": (2, "uint64", ""),
        "cache_size": (3, "uint64", ""),
        "max_num_seqs": (4, "uint64", ""),
        "device": (6, "string", ""),
        "plugin_config": (7, "string", ""),
        "enable_prefix_caching": (10, "bool", ""),
    },
    "EmbeddingsCalculatorOVOptions": {
        "models_path": (1, "string", "!"),
        "normalize_embeddings": (2, "bool", ""),
        "target_device": (3, "string", ""),
        "plugin_config": (4, "string", ""),
        "pooling": (5, ".mediapipe.EmbeddingsCalculatorOVOptions.Pooling", ""),
        "truncate": (6, "bool", ""),
    },
}


def _add_field(field: Any, name: str, number: int, kind: str, label: str) -> None:
    field.name, field.number, field.label = name, number, _LABELS[label]
    if kind.startswith("."):
        field.type_name = kind
        field.type = Field.TYPE_ENUM if kind.endswith("Pooling") else Field.TYPE_MESSAGE
    else:
        field.type = _SCALARS[kind]


@functools.cache
def _pool() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(name="graph.proto", package="mediapipe", syntax="proto2")
    file.dependency.append(any_pb2.DESCRIPTOR.name)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, told in fields.items():
            _add_field(message.field.add(), field, *told)
        if name == "MediaPipeOptions":
            message.extension_range.add(start=20000, end=2**29)
        if name == "SyncSetInputStreamHandlerOptions":
            extension = message.extension.add(extendee=".mediapipe.MediaPipeOptions")
            _add_field(extension, "ext", 140180711, f".mediapipe.{name}", "")
        if name == "EmbeddingsCalculatorOVOptions":
            enum = message.enum_type.add(name="Pooling")
            for number, value in enumerate(("CLS", "LAST", "MEAN")):
                enum.value.add(name=value, number=number)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(any_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(file.SerializeToString())
    return pool


def parsed_graph(text: str) -> Any:
    """A CalculatorGraphConfig.

    Raises:
        google.protobuf.text_format.ParseError: the text is not one.
    """
    found = message_factory.GetMessageClass(_pool().FindMessageTypeByName("mediapipe.CalculatorGraphConfig"))()
    return text_format.Parse(text, found, descriptor_pool=_pool())


def options_of(node: Any) -> Any:
    """The one message among a node's options."""
    (packed,) = node.node_options
    kind = packed.type_url.rpartition("/")[2]
    found = message_factory.GetMessageClass(_pool().FindMessageTypeByName(kind))()
    assert packed.Unpack(found)
    assert found.IsInitialized()
    return found
