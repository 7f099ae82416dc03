"""Samples that make packages of several models: none takes what was made of another."""

from __future__ import annotations

import subprocess
from pathlib import Path

from sample_modules import SAMPLES, sample_modules


def test_packages_of_other_ingredients_have_other_folders(tmp_path: Path) -> None:
    artifacts = [tmp_path / name for name in ("a", "b")]
    for artifact in artifacts:
        artifact.mkdir()
        (artifact / "manifest.json").write_text(artifact.name)
    one, other = artifacts
    with sample_modules("", "bench_vendor_onnx") as found:
        module = found["bench_vendor_onnx"]
        wanted = [
            module.Wanted(28, 32), module.Wanted(28, 64), module.Wanted(4, 32),
            module.Wanted(28, 32, "m", one), module.Wanted(28, 32, "m", other), module.Wanted(28, 32, "n", one),
        ]  # fmt: skip
        places = [module.Places(tmp_path, each) for each in wanted]
        made = [path for place in places for path in (place.ours(), place.ours(kernels=True), place.vendor(""))]
        assert len(set(made)) == len(made)
        planned = module.Places(tmp_path, module.Wanted(28, 32, plan=one))
        assert planned.ours() != places[0].ours() and planned.vendor("") == places[0].vendor("")


def test_models_keep_their_whole_names_and_two_of_one_name_are_refused() -> None:
    def names(*models: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(SAMPLES / "foreign_checkpoints" / "names.sh"), *models]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert names("/m.1/Llama-3.1-8B", "x/Llama-3.2-1B.gguf").stdout.split() == ["Llama-3.1-8B", "Llama-3.2-1B"]
    refused = names("a/Llama-3.1-8B", "b/Llama-3.1-8B.gguf")
    assert refused.returncode == 2 and "two models are called Llama-3.1-8B" in refused.stderr
