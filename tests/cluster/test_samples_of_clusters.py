"""The manifests and scripts of samples/cluster say what Kubernetes and Slurm can read, and what the command takes."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from conftest import ROOT

FOLDER = ROOT / "samples" / "cluster"


def cost_model() -> ModuleType:
    found = importlib.util.spec_from_file_location("cost_model", FOLDER / "cost_model.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["cost_model"] = module
    found.loader.exec_module(module)
    return module


# What KubeRay's RayJob (ray.io/v1) takes of what the manifest uses: every key must be here, those without ? must be
# there.  A text is a pattern for texts, (kind) a value, [kind] a list, {"": kind} a map.
NAME, QUANTITY = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", r"[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti)?"
AMOUNTS = {"cpu": QUANTITY, "memory": QUANTITY}
POD = {
    "spec": {
        "containers": [
            {
                "name": NAME, "image": r"[\w./-]+:[\w.-]+", "resources": {"requests": AMOUNTS, "limits": AMOUNTS},
                "volumeMounts": [{"name": NAME, "mountPath": r"/[\w/-]+"}],
            }
        ],
        "volumes": [{"name": NAME, "persistentVolumeClaim": {"claimName": NAME}}],
    }
}  # fmt: skip
GROUP = {"rayStartParams": {"": r".*"}, "template": POD}
WORKERS = {**GROUP, "groupName": NAME, "replicas": int, "minReplicas": int, "maxReplicas": int}
RAY_JOB = {
    "apiVersion": r"ray\.io/v1", "kind": "RayJob", "metadata": {"name": NAME},
    "spec": {
        "entrypoint": r"\S.*", "shutdownAfterJobFinishes?": bool, "backoffLimit?": int,
        "rayClusterSpec": {"rayVersion": r"\d+\.\d+\.\d+", "headGroupSpec": GROUP, "workerGroupSpecs": [WORKERS]},
    },
}  # fmt: skip


def check(value: Any, shape: Any, where: str = "job") -> None:
    if isinstance(shape, dict) and "" in shape:
        for key, own in value.items():
            check(own, shape[""], f"{where}.{key}")
    elif isinstance(shape, dict):
        known = {key.removesuffix("?"): kind for key, kind in shape.items()}
        assert isinstance(value, dict) and set(value) <= set(known), f"{where}: {set(value) - set(known)}"
        assert {key for key in shape if not key.endswith("?")} <= set(value), f"{where} lacks a key"
        for key, own in value.items():
            check(own, known[key], f"{where}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list) and value, where
        for number, own in enumerate(value):
            check(own, shape[0], f"{where}[{number}]")
    elif isinstance(shape, str):
        assert isinstance(value, str) and re.fullmatch(shape, value), f"{where}: {value!r}"
    else:
        assert type(value) is shape, f"{where}: {value!r}"


@pytest.mark.parametrize(
    ("path", "value"),
    [(("spec", "entryPoint"), "x"), (("spec", "backoffLimit"), "3"), (("metadata", "name"), "Ray Job"), (("kind",), 1)],
)
def test_the_schema_refuses(path: tuple[str, ...], value: object) -> None:
    job: Any = yaml.safe_load((FOLDER / "rayjob.yaml").read_text(encoding="utf-8"))
    inner = job
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(AssertionError):
        check(job, RAY_JOB)


def test_the_ray_job_is_whole() -> None:
    job = yaml.safe_load((FOLDER / "rayjob.yaml").read_text(encoding="utf-8"))
    check(job, RAY_JOB)
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"], (
                "Ray counts what it was promised"
            )
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    assert len({json_of(group["template"]["spec"]["volumes"]) for group in groups}) == 1, "all see the same folder"
    words = job["spec"]["entrypoint"].split()
    assert words[:2] == ["roundexport", "tune"] and words[2].startswith("/shared/") and words[3].startswith("/shared/")
    most = float(words[words.index("--max-ram") + 1])
    for group in cluster["workerGroupSpecs"]:
        memory = group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
        assert most < 0.8 * float(memory.removesuffix("Gi")), "Ray keeps a part of a pod's memory for its object store"


def json_of(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=True)


def test_the_slurm_script_is_a_script() -> None:
    script = FOLDER / "tune.slurm"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text(encoding="utf-8")
    directives = re.findall(r"^#SBATCH (--[a-z-]+)(?:=\S+)?$", text, re.MULTILINE)
    assert len(directives) == text.count("#SBATCH") > 3
    assert text.index("#SBATCH") < text.index("set -euo pipefail"), "sbatch reads no directive behind a command"


def test_the_cost_model_adds_up() -> None:
    model = cost_model()
    shape = model.Shape("8B", 4096, 14336, 0.25, 32)
    costs = [model.block(shape, 128, 512, workers, 1e12, math.inf) for workers in (1, 2, 4, 8)]
    assert costs[0].moved == 0
    assert all(a.shared > 1.7 * b.shared for a, b in itertools.pairwise(costs)), "shared work is not shared"
    assert len({cost.alone for cost in costs}) == 1
    assert model.block(shape, 128, 512, 16, 1e12, math.inf).shared > costs[3].shared / 2, "8 shards cannot keep 16 busy"
    done = subprocess.run([sys.executable, FOLDER / "cost_model.py"], check=True, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 11


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_what_a_sample_can_do_is_told(path: Path) -> None:
    done = subprocess.run([sys.executable, path, "--help"], check=True, capture_output=True, text=True)
    assert f"python samples/cluster/{path.name}" in done.stdout
