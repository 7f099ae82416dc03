"""The lines that hold the house together: who may import whom, what is packaged, what is public."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import roundexport
from conftest import ROOT
from roundexport import discovery
from roundexport.errors import UsageError

CORE = {"errors", "spec", "packing", "quantized", "artifact", "tensorfile", "atomic", "package"}
FOLDERS = {"roundexport": ROOT / "roundexport", "runtime": ROOT / "runtime", "kernels": ROOT / "kernels"}


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Absolute dotted names that a file imports, relative ones resolved."""
    package = {"runtime": "roundexport.runtime", "kernels": "roundexport.kernels"}.get(
        path.parent.name, ".".join(path.parent.relative_to(ROOT).parts)
    )
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield ".".join([*base, *(node.module.split(".") if node.module else [])])


def files(folder: str) -> list[Path]:
    return sorted(FOLDERS[folder].rglob("*.py"))


@pytest.mark.parametrize("path", files("runtime"), ids=lambda p: p.name)
def test_runtime_imports_no_torch_and_only_the_core(path: Path) -> None:
    for name in imports(path):
        assert name.partition(".")[0] not in {"torch", "transformers"}, f"{path.name} imports {name}"
        if name.startswith("roundexport.") and not name.startswith(("roundexport.runtime", "roundexport.kernels")):
            assert name.split(".")[1] in CORE | {"discovery"}, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", files("kernels"), ids=lambda p: p.name)
def test_kernels_import_only_the_core(path: Path) -> None:
    for name in imports(path, top_level_only=True):
        assert name.partition(".")[0] not in {"torch", "transformers"}, f"{path.name} imports {name} at import time"
        if name.startswith("roundexport.") and not name.startswith("roundexport.kernels"):
            assert name.split(".")[1] in CORE


def test_algorithms_and_targets_do_not_meet() -> None:
    for path in files("roundexport"):
        parts = path.relative_to(FOLDERS["roundexport"]).parts
        for name in imports(path):
            if parts[0] == "algorithms":
                assert not name.startswith(("roundexport.targets", "roundexport.capture")), f"{path} imports {name}"
            if parts[0] == "targets" or parts[0] == "capture.py":
                assert not name.startswith("roundexport.algorithms"), f"{path} imports {name}"


def test_roundexport_imports_the_runtime_only_inside_functions() -> None:
    for path in files("roundexport"):
        for name in imports(path, top_level_only=True):
            assert not name.startswith("roundexport.runtime"), f"{path} imports {name} at import time"


def test_importing_the_runtime_brings_no_heavy_library() -> None:
    code = (
        "import sys, roundexport.runtime, roundexport.kernels;"
        "print(sorted(m for m in ('torch', 'transformers', 'onnxruntime', 'openvino', 'onnx') if m in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert out.stdout.strip() == "[]"


def test_every_package_folder_is_listed_for_installation() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(config["tool"]["setuptools"]["packages"])
    found = set()
    for folder, name in (
        ("roundexport", "roundexport"),
        ("runtime", "roundexport.runtime"),
        ("kernels", "roundexport.kernels"),
    ):
        for path in FOLDERS[folder].rglob("__init__.py"):
            found.add(".".join([name, *path.parent.relative_to(FOLDERS[folder]).parts]))
    assert listed == found


def test_public_names_are_these() -> None:
    verbs = ["bench", "convert", "export", "generate", "inspect", "load", "tune", "verify"]
    assert roundexport.__all__ == ["TuneSettings", *verbs]
    for name in roundexport.__all__:
        assert callable(getattr(roundexport, name)), name


def test_the_readme_names_every_algorithm_and_target() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for kind in ("algorithms", "targets"):
        assert all(f"`{name}`" in readme for name in discovery.names(kind))


def test_no_module_has_a_public_functions_name() -> None:
    assert not {path.stem for path in FOLDERS["roundexport"].glob("*.py")} & set(roundexport.__all__)


@pytest.mark.parametrize("kind", ["algorithms", "targets", "kernels", "engines"])
def test_an_unknown_name_gets_the_list_of_known_ones(kind: str) -> None:
    known = discovery.names(kind)
    assert known
    with pytest.raises(UsageError) as caught:
        discovery.load(kind, "no_such_thing")
    assert all(name in str(caught.value) for name in known)


@pytest.mark.parametrize("name", discovery.names("algorithms"))
def test_algorithm_contract(name: str) -> None:
    module = discovery.load("algorithms", name)
    assert module.__doc__ and module.Settings() and isinstance(module.NEEDS_CALIBRATION, bool)
    assert any(callable(getattr(module, f, None)) for f in ("tune_block", "transform_block", "train_model", "finish"))


@pytest.mark.parametrize("name", discovery.names("targets"))
def test_target_contract(name: str) -> None:
    module = discovery.load("targets", name)
    assert module.__doc__ and module.Settings()
    assert all(callable(getattr(module, f)) for f in ("refusal", "export", "read_back", "speed_note"))


@pytest.mark.parametrize("name", discovery.names("kernels"))
def test_kernel_contract(name: str) -> None:
    module = discovery.load("kernels", name)
    assert module.__doc__ and callable(module.reference) and callable(module.run)
    assert module.available() is None or isinstance(module.available(), str)
