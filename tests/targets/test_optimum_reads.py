"""Packages in optimum's classes and sentence-transformers' backends, which run in an environment of their own.

ROUNDEXPORT_OPTIMUM_PYTHON names its Python: tried with sentence-transformers 5.7, optimum 2.3, optimum-intel 2.2 and
optimum-onnx 0.1 (which asks for optimum 2.1 and works with 2.3: pip install --no-deps) on transformers 4.57.  Each of
both may have an environment of its own, as of samples/foreign_graphs.sh; -k onnx or -k openvino chooses.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import ROOT, tuned
from roundexport.formats.artifact import Artifact
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.dequantized_model import DequantizedModel
from roundexport.runtime.loading import load
from roundexport.targets.export import export

PYTHON = os.environ.get("ROUNDEXPORT_OPTIMUM_PYTHON", "")
pytestmark = [pytest.mark.compat, pytest.mark.skipif(not PYTHON, reason="ROUNDEXPORT_OPTIMUM_PYTHON is not set")]
TEXTS = ["The sea was calm.", "An old man stood on the shore and looked at the sea.", "Boats"]
PREFIXES = {"onnx": "ORT", "openvino": "OV"}
Shared = Callable[[str, Callable[[Path], object]], Path]


def told(*asked: object) -> Any:
    command = [PYTHON, str(ROOT / "tests" / "optimum_side.py"), *map(str, asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_backends_of_sentence_transformers(
    target: str, packages: Callable[[str, str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder = shutil.copytree(packages("bert", target)[1], tmp_path / "package")
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4 does not know the class of 5
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    vectors = np.array(told("embed", folder, target, *TEXTS))
    ours = np.array(load(packages("bert", target)[1], precise=True).embed(TEXTS))
    cosines = (vectors * ours).sum(-1) / np.linalg.norm(vectors, axis=-1) / np.linalg.norm(ours, axis=-1)
    assert cosines.min() > 0.999


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["t5", "bart", "marian", "whisper"])
@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_two_halves_in_optimum(
    target: str, family: str, beams: int, models: Callable[[str], Path], shared: Shared, tmp_path: Path
) -> None:
    artifact = shared(f"{family}-whole", lambda to: tuned(models(family), to, algorithm="rtn", bits=8, group_size=32))
    exact = {"accuracy_level": 0} if target == "onnx" else {}
    folder = shared(f"{family}-whole-{target}", lambda to: export(artifact, to, to=target, settings=exact))
    generator = np.random.default_rng(1)
    given: dict[str, Any] = {"input_ids": generator.integers(4, 384, (2, 30)), "attention_mask": np.ones((2, 30), int)}
    if family == "whisper":
        given = {"input_features": generator.standard_normal((2, 16, 80)).astype(np.float32)}
    np.savez(tmp_path / "inputs.npz", **given)
    kind = f"{PREFIXES[target]}ModelFor{'SpeechSeq2Seq' if family == 'whisper' else 'Seq2SeqLM'}"
    found = told("answer", folder, kind, tmp_path / "inputs.npz", beams)
    opened = Artifact.open(artifact)
    model: Any = DequantizedModel(opened, Checkpoint.open(str(opened.manifest.source["location"]))).model
    tensors = {name: torch.from_numpy(values) for name, values in given.items()}
    wanted = model.generate(**tensors, num_beams=beams, max_new_tokens=16, do_sample=False).tolist()
    assert found == wanted
