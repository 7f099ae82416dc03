"""What is in samples/serving parses, and names only flags, extras and paths that there are."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runtime_toys as toys
import yaml
from model_server_schema import options_of, parsed_graph

from conftest import ROOT
from roundexport.cli.serving import serve
from roundexport.errors import UnsupportedError, UsageError
from roundexport.formats.package import read_package

FOLDER = ROOT / "samples" / "serving"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def instructions() -> list[tuple[str, str]]:
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [tuple(line.split(" ", 1)) for line in text.splitlines() if line and not line.startswith("#")]  # type: ignore[misc]


def flags() -> set[str]:
    return {f"--{name.replace('_', '-')}" for name in inspect.signature(serve).parameters if name != "packages"}


def container() -> dict[str, Any]:
    return documents("kserve.yaml")[1]["spec"]["predictor"]["containers"][0]  # type: ignore[no-any-return]


def commands() -> dict[str, list[str]]:
    given = {name: value for name, value in instructions() if name in ("ENTRYPOINT", "CMD")}
    assert json.loads(given["ENTRYPOINT"]) == ["roundexport", "serve"]
    return {"Dockerfile": json.loads(given["CMD"]), "kserve.yaml": container()["args"]}


@pytest.mark.parametrize("where", ["Dockerfile", "kserve.yaml"])
def test_the_server_knows_every_flag(where: str) -> None:
    used = {word for word in commands()[where] if word.startswith("--")}
    assert used and used <= flags(), used - flags()


def test_the_image_installs_extras_that_there_are() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    engine = re.search(r"ARG ENGINE=(\w+)", text)
    named = re.search(r"\[\$ENGINE,(\w+)\]", text)
    assert engine and named and {engine[1], named[1], "openvino"} <= extras.keys()


def test_the_image_runs_as_nobody_and_says_how_it_is() -> None:
    names = [name for name, _ in instructions()]
    assert "USER" in names and names.index("USER") > names.index("RUN")
    assert next(value for name, value in instructions() if name == "USER") not in ("root", "0")
    assert "/health" in next(value for name, value in instructions() if name == "HEALTHCHECK")


def test_compose_is_read_only_with_a_key_and_on_loopback() -> None:
    service = documents("compose.yaml")[0]["services"]["roundexport"]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and service["tmpfs"] == ["/tmp"]
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert service["environment"]["ROUNDEXPORT_API_KEY"].startswith("${ROUNDEXPORT_API_KEY:?")
    build = service["build"]
    assert (FOLDER / build["context"]).resolve() == ROOT and (ROOT / build["dockerfile"]).is_file()


def test_the_inference_service_matches_the_container() -> None:
    secret, service = documents("kserve.yaml")
    assert (secret["kind"], service["kind"]) == ("Secret", "InferenceService")
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    found = container()
    port = int(found["args"][found["args"].index("--port") + 1])
    assert found["ports"][0]["containerPort"] == port
    assert {found[probe]["httpGet"]["port"] for probe in ("readinessProbe", "livenessProbe")} == {port}
    wanted = found["env"][0]["valueFrom"]["secretKeyRef"]
    assert wanted["name"] == secret["metadata"]["name"] and wanted["key"] in secret["stringData"]
    mounted = {mount["name"]: mount["mountPath"] for mount in found["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in service["spec"]["predictor"]["volumes"]}
    assert found["args"][0] == mounted["models"]
    assert found["securityContext"]["readOnlyRootFilesystem"] and found["securityContext"]["runAsNonRoot"]
    drain = int(found["args"][found["args"].index("--drain") + 1])
    assert service["spec"]["predictor"]["terminationGracePeriodSeconds"] > drain


@pytest.fixture
def model_server() -> Any:
    spec = importlib.util.spec_from_file_location("model_server", FOLDER / "model_server.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_repository_for_model_server_takes_decoders_and_encoders(tmp_path: Path, model_server: Any) -> None:
    decoder, encoder = toys.ov_decoder(tmp_path / "text"), toys.ov_encoder(tmp_path / "vectors")
    repository = tmp_path / "repository"
    for package in (decoder, encoder):
        folder = model_server.add(package, repository, package.name)
        assert folder == repository / package.name and read_package(folder)  # what was copied is whole
    config = json.loads((repository / "config.json").read_text())
    listed = [{"config": {"name": name, "base_path": name}} for name in ("text", "vectors")]
    assert config == {"model_config_list": listed}
    with pytest.raises(UsageError, match="is there already"):
        model_server.add(decoder, repository, "text")
    with pytest.raises(UsageError, match="this one is for onnx"):
        model_server.add(toys.onnx_decoder(tmp_path / "onnx"), repository, "onnx")


def test_a_repository_keeps_what_else_its_config_says(tmp_path: Path, model_server: Any) -> None:
    old = {"model_config_list": [{"config": {"name": "a", "base_path": "a"}}], "mediapipe_config_list": [{"name": "b"}]}
    (tmp_path / "config.json").write_text(json.dumps(old))
    model_server.add(toys.ov_encoder(tmp_path / "vectors"), tmp_path, "c")
    found = json.loads((tmp_path / "config.json").read_text())
    assert [entry["config"]["name"] for entry in found["model_config_list"]] == ["a", "c"]
    assert found["mediapipe_config_list"] == old["mediapipe_config_list"]


def test_graphs_of_model_server_are_read_by_protobuf(tmp_path: Path, model_server: Any) -> None:
    graph = parsed_graph(model_server.graph(read_package(toys.ov_decoder(tmp_path / "text")), cache_gb=3))
    (node,) = graph.node
    assert (node.calculator, list(graph.input_stream)) == ("HttpLLMCalculator", ["HTTP_REQUEST_PAYLOAD:input"])
    assert list(node.input_side_packet) == ["LLM_NODE_RESOURCES:llm", "LLM_NODE_EXECUTION_CONTEXTS:llm_ctx"]
    assert node.input_stream_info[0].back_edge and "LOOPBACK:loopback" in node.output_stream
    assert "LOOPBACK:0" in str(node.input_stream_handler.options)
    options = options_of(node)
    assert (options.models_path, options.device, options.cache_size) == ("./", "CPU", 3)
    assert options.enable_prefix_caching

    manifest = read_package(toys.ov_encoder(tmp_path / "vectors"))
    for mode, number, normalize in (("cls", 0, True), ("last", 1, False), ("mean", 2, True)):
        given = replace(manifest, pooling={"mode": mode, "normalize": normalize})
        (node,) = parsed_graph(model_server.graph(given)).node
        options = options_of(node)
        assert node.calculator == "EmbeddingsCalculatorOV"
        assert (options.models_path, options.pooling, options.normalize_embeddings) == ("./", number, normalize)
    for change, words in (
        (
            {"pooling": {"mode": "weightedmean", "normalize": True}},
            "pools by cls, last, mean; this package by weightedm",
        ),
        ({"task": "classify", "pooling": None}, "task is classify"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            model_server.graph(replace(manifest, **change))
