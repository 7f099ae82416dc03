"""The lines that hold the house together; its floors are in .importlinter."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import roundexport
from conftest import ROOT
from roundexport import plugins
from roundexport.algorithms.interface import load_finisher, load_rounding, load_transform
from roundexport.errors import RoundexportError, UsageError
from roundexport.targets.interface import load_target

FOLDERS = {
    "roundexport": ROOT / "roundexport",
    "roundexport.runtime": ROOT / "runtime",
    "roundexport.kernels": ROOT / "kernels",
}
LONGEST = 400  # lines of a file


def modules() -> dict[str, Path]:
    """Every file of the installed package by its dotted name."""
    found = {}
    for name, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([name, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


def imports(module: str, *, top_level_only: bool = False) -> Iterator[str]:
    """Absolute dotted names that a file imports, relative ones resolved; of our own, the file that is meant."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            name = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                yield f"{name}.{alias.name}" if f"{name}.{alias.name}" in MODULES else name


@cache
def arrows() -> dict[str, set[str]]:
    """Files that each file imports; inside functions and for type checkers, too."""
    found = {name: {target for target in imports(name) if target in MODULES} - {name} for name in MODULES}
    # The package's own front door imports everything lazily; nobody imports it for more than a name it defines.
    return {**found, "roundexport": set()}


def floors(arrows: Mapping[str, set[str]]) -> tuple[list[list[str]], dict[str, list[str]]]:
    """What imports nothing, then what imports only that, and so on; and what is left: circles and what imports them."""
    left, found = dict(arrows), list[list[str]]()
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        found.append(free)
        for name in free:
            del left[name]
    return found, {name: sorted(targets & left.keys()) for name, targets in left.items()}


def test_no_circle_among_files() -> None:
    assert not floors(arrows())[1]


def test_rooms_lie_on_at_most_twelve_floors() -> None:
    """A room is a folder of roundexport/, or a file at its top."""
    rooms: dict[str, set[str]] = {}
    for name, targets in arrows().items():
        room = ".".join(name.split(".")[:2])
        rooms.setdefault(room, set()).update({".".join(target.split(".")[:2]) for target in targets} - {room})
    del rooms["roundexport"]
    found, circles = floors(rooms)
    assert not circles and len(found) <= 12, found


ROOMS = ("roundexport", "runtime", "kernels", "samples", "tests")


_REPORTED = {"A": (1, 2, 3, 4, 6, 7, 9, 10, 11, 12, 14), "B": (1, 2, *range(5, 15)), "C": range(2, 11),
             "D": (1, 2, 3, 4, 5, 7, 8, 9, 10, 11), "H": range(1, 23), "F": range(1, 11)}  # fmt: skip


def test_every_reported_fault_has_its_row_and_every_test_named_there_exists() -> None:
    text = (ROOT / "tests" / "reported-faults.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and not line.startswith("| no.")]
    assert all(len(row) == 4 for row in rows)
    found = {number for row in rows for number in row[0].strip("| ").split(", ")} - {"–"}
    assert found == {f"{letter}{number}" for letter, numbers in _REPORTED.items() for number in numbers}
    named = {name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row[3])}
    assert len(named) > 40 and not [name for name in sorted(named) if not (ROOT / "tests" / name).is_file()]


@pytest.mark.parametrize("room", ROOMS)
def test_files_are_short(room: str) -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / room).rglob("*.py")}
    assert lines
    assert not {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > LONGEST}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("roundexport.runtime")])
def test_runtime_imports_no_torch(module: str) -> None:
    assert not {name.partition(".")[0] for name in imports(module)} & {"torch", "transformers"}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("roundexport.kernels")])
def test_kernels_import_torch_only_inside_functions(module: str) -> None:
    assert not {name.partition(".")[0] for name in imports(module, top_level_only=True)} & {"torch", "transformers"}


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("roundexport.runtime")])
def test_roundexport_imports_the_runtime_only_inside_functions(module: str) -> None:
    assert not [name for name in imports(module, top_level_only=True) if name.startswith("roundexport.runtime")]


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
    found = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert listed == found


def test_public_names_are_these() -> None:
    verbs = [
        "bench",
        "convert",
        "export",
        "generate",
        "import_checkpoint",
        "inspect",
        "load",
        "rewrite",
        "sweep",
        "tune",
        "verify",
    ]
    assert roundexport.__all__ == ["Checkpoint", "TuneSettings", *verbs]
    for name in roundexport.__all__:
        assert callable(getattr(roundexport, name)), name


def test_the_readme_names_every_algorithm_and_target() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for kind in ("algorithms", "targets"):
        assert all(f"`{name}`" in readme for name in plugins.names(kind))


def test_no_module_has_a_public_functions_name() -> None:
    assert not {path.stem for path in (ROOT / "roundexport").glob("*.py")} & set(roundexport.__all__)


@pytest.mark.parametrize("kind", ["algorithms", "targets", "kernels", "engines"])
def test_an_unknown_name_gets_the_list_of_known_ones(kind: str) -> None:
    known = plugins.names(kind)
    assert known
    with pytest.raises(UsageError) as caught:
        plugins.load(kind, "no_such_thing")
    assert all(name in str(caught.value) for name in known)


LOADERS = {"rounding": load_rounding, "transforms": load_transform, "finishers": load_finisher}


@pytest.mark.parametrize(("role", "name"), [(role, name) for role in LOADERS for name in plugins.names(role)])
def test_algorithm_contract(role: str, name: str) -> None:
    assert plugins.load(role, name).__doc__
    settings = LOADERS[role](name).settings()
    assert settings.forward_passes(4) >= 0


def test_a_method_of_another_role_is_named_as_what_it_is() -> None:
    with pytest.raises(UsageError, match=r"'teq' is a transform, not a rounding method; known: bct, gram, "):
        load_rounding("teq")
    with pytest.raises(UsageError, match=r"'gram' is a rounding method, not a finisher; known: end_to_end"):
        load_finisher("gram")


def test_a_file_that_offers_nothing_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(plugins.load("rounding", "rtn"), "METHOD")
    with pytest.raises(RoundexportError, match=r"rtn must define METHOD = RoundingMethod\(...\); it defines none"):
        load_rounding("rtn")
    monkeypatch.setattr(plugins.load("transforms", "teq"), "METHOD", load_finisher("end_to_end"))
    with pytest.raises(RoundexportError, match=r"teq must define .*; it defines a Finisher"):
        load_transform("teq")


@pytest.mark.parametrize("name", plugins.names("targets"))
def test_target_contract(name: str) -> None:
    assert plugins.load("targets", name).__doc__
    target = load_target(name)
    settings = target.read_settings(name, {"device": "cpu", "max_context": None})
    assert settings == target.settings()
    with pytest.raises(UsageError, match=rf"target {name} has no setting dice; it has .*device, .*max_context"):
        target.read_settings(name, {"dice": 1})


@pytest.mark.parametrize("name", plugins.names("kernels"))
def test_kernel_contract(name: str) -> None:
    module = plugins.load("kernels", name)
    assert module.__doc__ and callable(module.reference) and callable(module.run)
    assert module.available() is None or isinstance(module.available(), str)
