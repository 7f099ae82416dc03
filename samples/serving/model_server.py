"""A model repository for OpenVINO Model Server from a package: model_server.py PACKAGE REPOSITORY [--name NAME].

    REPOSITORY/config.json            lists the model
    REPOSITORY/NAME/graph.pbtxt       text: HttpLLMCalculator with continuous batching; encoders: EmbeddingsCalculatorOV
    REPOSITORY/NAME/…                 the package's files, copied

    docker run --rm -v "$PWD/REPOSITORY:/models:ro" -p 8000:8000 openvino/model_server:latest \
      --rest_port 8000 --config_path /models/config.json

An existing REPOSITORY gets the model added.  There is no folder of versions (NAME/1): those belong to the server's
classic models, which it runs as tensors in and out.  A folder with a graph.pbtxt is a graph, graphs are not versioned,
and a request's version is ignored; another version of a package is another NAME.  Of encoders the server pools by cls,
last or mean, each normalized or not; others, and packages with other tasks, are refused here.

Source: docs/mediapipe.md (layout, config.json), docs/llm/reference.md, src/graph_export/graph_export.cpp and the
calculators' .proto files in https://github.com/openvinotoolkit/model_server, of August 2026.  Never run against the
server itself: tests/test_serving_samples.py parses the graphs with protobuf against those messages.
"""

import argparse
import json
import shutil
from pathlib import Path

from roundexport.errors import UnsupportedError, UsageError
from roundexport.formats.package import PackageManifest, read_package
from roundexport.storage.atomic import replace_file

TEXT = """input_stream: "HTTP_REQUEST_PAYLOAD:input"
output_stream: "HTTP_RESPONSE_PAYLOAD:output"

node: {{
  name: "LLMExecutor"
  calculator: "HttpLLMCalculator"
  input_stream: "LOOPBACK:loopback"
  input_stream: "HTTP_REQUEST_PAYLOAD:input"
  input_side_packet: "LLM_NODE_RESOURCES:llm"
  input_side_packet: "LLM_NODE_EXECUTION_CONTEXTS:llm_ctx"
  output_stream: "LOOPBACK:loopback"
  output_stream: "HTTP_RESPONSE_PAYLOAD:output"
  input_stream_info: {{
    tag_index: 'LOOPBACK:0',
    back_edge: true
  }}
  node_options: {{
    [type.googleapis.com / mediapipe.LLMCalculatorOptions]: {{
      models_path: "./",
      device: "CPU",
      enable_prefix_caching: true,
      cache_size: {cache_gb}
    }}
  }}
  input_stream_handler {{
    input_stream_handler: "SyncSetInputStreamHandler",
    options {{
      [mediapipe.SyncSetInputStreamHandlerOptions.ext] {{
        sync_set {{
          tag_index: "LOOPBACK:0"
        }}
      }}
    }}
  }}
}}
"""
EMBEDDINGS = """input_stream: "REQUEST_PAYLOAD:input"
output_stream: "RESPONSE_PAYLOAD:output"

node {{
  name: "EmbeddingsExecutor"
  calculator: "EmbeddingsCalculatorOV"
  input_side_packet: "EMBEDDINGS_NODE_RESOURCES:embeddings_servable"
  input_stream: "REQUEST_PAYLOAD:input"
  output_stream: "RESPONSE_PAYLOAD:output"
  node_options: {{
    [type.googleapis.com / mediapipe.EmbeddingsCalculatorOVOptions]: {{
      models_path: "./",
      normalize_embeddings: {normalize},
      pooling: {pooling},
      target_device: "CPU"
    }}
  }}
}}
"""
_POOLING = ("cls", "last", "mean")


def graph(manifest: PackageManifest, cache_gb: int = 1) -> str:
    """The graph of a package.

    Raises:
        UsageError: the package is not for OpenVINO.
        UnsupportedError: the server has no graph for what the package does.
    """
    if manifest.target != "openvino":
        raise UsageError(f"OpenVINO Model Server takes packages for openvino; this one is for {manifest.target}")
    if manifest.task == "generate":
        return TEXT.format(cache_gb=cache_gb)
    if manifest.task != "embed" or manifest.pooling is None:
        raise UnsupportedError(
            f"a graph is made for packages that generate or embed; this one's task is {manifest.task}"
        )
    if manifest.pooling["mode"] not in _POOLING:
        raise UnsupportedError(f"the server pools by {', '.join(_POOLING)}; this package by {manifest.pooling['mode']}")
    normalize = "true" if manifest.pooling["normalize"] else "false"
    return EMBEDDINGS.format(normalize=normalize, pooling=manifest.pooling["mode"].upper())


def add(package: Path, repository: Path, name: str) -> Path:
    """Put a package into a repository; returns its folder there.

    Raises:
        UsageError: the repository has a model of that name, or the package is not for OpenVINO.
        UnsupportedError: the server has no graph for what the package does.
        ArtifactError: the package is damaged.
    """
    manifest = read_package(package)
    text, folder = graph(manifest), repository / name
    if folder.exists():
        raise UsageError(f"{folder} is there already; give another --name")
    repository.mkdir(parents=True, exist_ok=True)
    aside = repository / f".{name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(package, aside)
    (aside / "graph.pbtxt").write_text(text, encoding="utf-8")
    aside.rename(folder)
    config = repository / "config.json"
    known = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    known.setdefault("model_config_list", []).append({"config": {"name": name, "base_path": name}})
    replace_file(config, (json.dumps(known, indent=2) + "\n").encode())
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--name", help="default: the package's folder name")
    given = parser.parse_args()
    print(add(given.package, given.repository, given.name or given.package.resolve().name))
