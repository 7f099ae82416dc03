"""A limit of memory reaches whoever could exceed it: nobody calls without ``max_ram`` what takes it.

A checkpoint is also opened where there is no limit to know, as in workers; that counts where the limit is known.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from conftest import ROOT

FILES = sorted((ROOT / "roundexport").rglob("*.py"))
OPENING = "Checkpoint.open"
KNOWN_BY = {"max_ram", "settings", "base"}
"""Arguments by which a function knows the limit: itself, and settings of which it is one."""


def takers(trees: dict[Path, ast.Module]) -> set[str]:
    """Functions, methods and classes that take ``max_ram``, a method as Class.name, a class by its constructor."""
    found = set()
    for tree in trees.values():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and "max_ram" in arguments(node):
                found.add(node.name)
            elif isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and "max_ram" in arguments(inner):
                        found.add(node.name if inner.name == "__init__" else f"{node.name}.{inner.name}")
    return found


def arguments(function: ast.FunctionDef) -> set[str]:
    """Names of a function's parameters."""
    every = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    return {argument.arg for argument in every}


def knows(function: ast.FunctionDef) -> bool:
    """Whether a function knows the limit."""
    inside = {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    return bool(arguments(function) & KNOWN_BY or inside & {"settings", "max_ram", "_max_ram"})


def forgotten(tree: ast.Module, taking: set[str]) -> Iterator[tuple[str, str]]:
    """Function and what it calls without the limit."""
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        own = {name: name for name in taking} | called(tree.body, taking) | called(ast.walk(function), taking)
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            name = own.get(ast.unparse(call.func))
            given = [keyword.arg in {"max_ram", None} for keyword in call.keywords]
            given += ["max_ram" in ast.unparse(value) for value in call.args]
            if name is not None and not any(given) and (name != OPENING or knows(function)):
                yield function.name, name


def called(nodes: Iterable[ast.AST], taking: set[str]) -> dict[str, str]:
    """What is imported among some statements, by the name it has there."""
    imported = [alias for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    return {alias.asname or alias.name: alias.name for alias in imported if alias.name in taking}


def test_nobody_forgets_the_limit() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    taking = takers(trees)
    assert {"export", "verify", "export_w8a8", "import_checkpoint", "Checkpoint.open", "PackageWriter"} <= taking
    public = {name for name in taking if not name.startswith("_")}
    each = {path: [*forgotten(tree, public | takers({path: tree}))] for path, tree in trees.items()}
    found = {str(path.relative_to(ROOT)): calls for path, calls in each.items() if calls}
    assert not found


def test_a_call_without_it_is_found() -> None:
    source = """
from x import export as run
def verb(max_ram=None):
    run(1)
    run(1, max_ram=max_ram)
    own.run(1)
"""
    assert [*forgotten(ast.parse(source), {"export"})] == [("verb", "export")]
