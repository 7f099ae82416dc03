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


def test_the_ray_job_is_whole() -> None:
    job = yaml.safe_load((FOLDER / "rayjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job["spec"]) <= {"entrypoint", "shutdownAfterJobFinishes", "backoffLimit", "rayClusterSpec"}
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "flags of ray are texts"
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
