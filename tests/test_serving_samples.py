"""What is in samples/serving parses, and names only flags, extras and paths that there are."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import runtime_toys as toys
import yaml

from conftest import ROOT
from roundexport.cli.serving import serve
from roundexport.errors import UsageError
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
    for package in (decoder, encoder):
        model_server.add(package, tmp_path / "repository", package.name)
    config = json.loads((tmp_path / "repository" / "config.json").read_text())
    assert config["mediapipe_config_list"] == [{"name": n, "base_path": n} for n in ("text", "vectors")]
    text = (tmp_path / "repository" / "text" / "graph.pbtxt").read_text()
    vectors = (tmp_path / "repository" / "vectors" / "graph.pbtxt").read_text()
    assert "HttpLLMCalculator" in text and "LLM_NODE_EXECUTION_CONTEXTS:llm_ctx" in text
    assert (
        "EmbeddingsCalculatorOV" in vectors and f"pooling: {read_package(encoder).pooling['mode'].upper()}" in vectors
    )  # type: ignore[index]
    assert all(graph.count("{") == graph.count("}") and "{{" not in graph for graph in (text, vectors))
    read_package(tmp_path / "repository" / "text")  # what was copied is whole
    with pytest.raises(UsageError, match="is there already"):
        model_server.add(decoder, tmp_path / "repository", "text")
    with pytest.raises(UsageError, match="this one is for onnx"):
        model_server.add(toys.onnx_decoder(tmp_path / "onnx"), tmp_path / "repository", "onnx")
