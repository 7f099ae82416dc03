"""The verb: an artifact's integers into a float graph that exists already.

    GRAPH  a .onnx or .xml file, or a folder with one of them, all of whose other files are copied beside the result
    OUT    a folder with the graph under its own name, and rewrite.json: what was put where

A layer of the artifact that is not in the graph is an error, unless it is allowed (`partial`).  The graph is written
aside; every integer is read back from the files and compared; the outputs are compared with those of the float graph
whose constants are the integers' floats (comparing.py); then the folder is renamed.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from roundexport.environment.memory import MemoryLimit
from roundexport.errors import ArtifactError, UnsupportedError, UsageError
from roundexport.formats.artifact import Artifact
from roundexport.progress import Progress
from roundexport.storage.atomic import write_folder
from roundexport.targets.export import source_of

from .comparing import Comparison, compare
from .layers import Layer, TunedLayers
from .matching import FloatConstant, Matches, Replacement, equal_values, match

if TYPE_CHECKING:
    from .onnx_graph import OnnxGraph
    from .openvino_graph import OpenVinoGraph

    Graph = OnnxGraph | OpenVinoGraph

REPORT = "rewrite.json"
DIALECTS = ("onnxruntime", "standard")


@dataclass(frozen=True)
class Rewriting:
    """What `rewrite` did.

    Args:
        graph: name of the graph's file.
        layers: layers of the artifact whose integers are in the graph, read back and equal.
        places: (constant, reader, its layers) of every weight that was replaced.
        missing: (layer, why it was not found), allowed by ``partial``.
        twins: (layer, another one with the same floats and integers that stands for it).
        changed_floats: floats that tuning changed, put in the place of the graph's.
        outputs: how far its outputs are from those of the float graph with dequantized weights.
        bytes_before: size of the float graph's files.
        bytes_after: of the rewritten ones.
    """

    graph: str
    layers: tuple[str, ...]
    places: tuple[tuple[str, str, tuple[str, ...]], ...]
    missing: tuple[tuple[str, str], ...]
    twins: tuple[tuple[str, str], ...]
    changed_floats: tuple[str, ...]
    outputs: Comparison
    bytes_before: int
    bytes_after: int

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return asdict(self)


def rewrite(  # noqa: PLR0913  (the parameters are the verb's flags)
    graph: str | Path,
    artifact: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    dialect: str = "onnxruntime",
    partial: bool = False,
    inputs: Mapping[str, NDArray[Any]] | None = None,
    max_ram: float | None = None,
    progress: bool | Progress = True,
) -> Rewriting:
    """Put an artifact's integers into a float ONNX or OpenVINO graph.

    Args:
        graph: the graph's file, .onnx or .xml, or a folder that holds one of them.
        artifact: the artifact folder.
        out: folder to make; must not exist.
        model: the float model, where it is no longer at the place that the artifact names.
        dialect: of an ONNX graph: ``onnxruntime`` (MatMulNBits) or ``standard`` (DequantizeLinear).
        partial: allow layers of the artifact that are not in the graph.
        inputs: inputs to compare outputs on, by name; those not given are made up.
        max_ram: GiB of memory to stay within.
        progress: report on stderr, or where to report.

    Returns:
        What was found, replaced and compared.

    Raises:
        UsageError: no such graph, or ``out`` exists.
        ArtifactError: the artifact is damaged, ``model`` is another one, or what was written is not what it should be.
        UnsupportedError: a layer is not in the graph, or the outputs differ.
        WontFitError: it takes more than ``max_ram``.
    """
    limit = MemoryLimit(max_ram)
    path = _graph_file(Path(graph))
    if dialect not in DIALECTS:
        raise UsageError(f"dialect {dialect!r} is not known; use {' or '.join(DIALECTS)}")
    if dialect != DIALECTS[0] and path.suffix != ".onnx":
        raise UsageError(f"{path.name} is an OpenVINO graph, which has no dialects")
    limit.check(
        "rewriting a graph",
        {"the float graph, twice while its runtime opens it": 2 * _size(path)},
        advice="use a machine with more memory",
    )
    with Progress.of(progress) as shown, shown.stage(f"rewriting {path.name}"), write_folder(Path(out)) as folder:
        opened = Artifact.open(artifact)
        tuned = TunedLayers(opened, source_of(opened, model, shown, max_ram))
        with shown.stage("finding the tuned layers by their float values"):
            read = _open(path)
            changed = _put_changed_floats(read, tuned)
            found = match(read.constants(), tuned)
        _check(found, path, partial)
        if Path(graph).is_dir():
            _copy_others(path, folder, read)
        with shown.stage("writing the graph and reading its integers back"):
            _quantize(read, found, tuned, folder, dialect)
            _prove(read, folder / path.name, found, opened)
        with shown.stage("comparing outputs with the float graph's"), tempfile.TemporaryDirectory(dir=folder) as aside:
            outputs = _compared(path, folder, Path(aside), found, tuned, inputs or {})
        done = Rewriting(
            graph=path.name,
            layers=tuple(found.layers),
            places=tuple(_place(piece) for piece in found.replacements),
            missing=tuple(found.missing.items()),
            twins=tuple(found.twins.items()),
            changed_floats=changed,
            outputs=outputs,
            bytes_before=_size(path),
            bytes_after=_size(folder / path.name),
        )
        (folder / REPORT).write_text(json.dumps(_report(done, opened), indent=1) + "\n", encoding="utf-8")
    return done


def _graph_file(given: Path) -> Path:
    if given.is_file() and given.suffix in (".onnx", ".xml"):
        return given
    if not given.is_dir():
        raise UsageError(f"{given} is neither a graph (.onnx, .xml) nor a folder with one")
    graphs = sorted(given.glob("*.onnx")) + [p for p in sorted(given.glob("*.xml")) if "tokenizer" not in p.name]
    if len(graphs) != 1:
        names = ", ".join(graph.name for graph in graphs) or "none"
        raise UsageError(f"{given} holds {len(graphs)} graphs ({names}); name the file of one")
    return graphs[0]


def _open(path: Path) -> Graph:
    if path.suffix == ".onnx":
        from .onnx_graph import OnnxGraph

        return OnnxGraph(path)
    from roundexport.environment.openvino_import import import_openvino

    import_openvino()
    from .openvino_graph import OpenVinoGraph

    return OpenVinoGraph(path)


def _put_changed_floats(graph: Graph, tuned: TunedLayers) -> tuple[str, ...]:
    """Put floats that tuning changed (norms, biases) in the place of the graph's; returns their names.

    Raises:
        UnsupportedError: one is not there, or stands where others with the same values, changed otherwise, do.
    """
    names = []
    changes = list(tuned.overrides())
    constants = list(graph.floats()) if changes else []
    for name, before, after in changes:
        equal = [own for own, values in constants if equal_values(_squeezed(values), _squeezed(before))]
        named = [own for own in equal if own == name or own.endswith(f".{name}")] if len(equal) > 1 else equal
        rivals = [other for other, its, later in changes
                  if other != name and np.array_equal(its, before) and not np.array_equal(later, after)]  # fmt: skip
        if not equal or (len(named) != 1 and rivals):
            why = f"it cannot be told from {rivals[0]} by value" if equal else "no constant holds its float values"
            raise UnsupportedError(
                f"tuning changed {name} too, and in the graph {why}; tune without transformations (--transform) and "
                "without a finisher for graphs made elsewhere, or use `export`"
            )
        for own in named if len(named) == 1 else equal:
            shape = next(values.shape for other, values in constants if other == own)
            graph.set_floats(own, np.ascontiguousarray(after.reshape(shape)))
        names.append(name)
    return tuple(names)


def _squeezed(values: NDArray[Any]) -> NDArray[Any]:
    return values.reshape([size for size in values.shape if size != 1] or [1])


def _check(found: Matches, path: Path, partial: bool) -> None:
    """Refuse a graph without some layers, unless that is allowed; and one without any in every case.

    Raises:
        UnsupportedError: naming the first ones.
    """
    if found.missing and (not partial or not found.replacements):
        first = [f"{name}: {why}" for name, why in list(found.missing.items())[:5]]
        more = f"\n  and {len(found.missing) - 5} more" if len(found.missing) > 5 else ""
        advice = "; --partial leaves them float" if found.replacements else ""
        raise UnsupportedError(
            f"{path}: {len(found.layers)} layers of the artifact are in the graph, {len(found.missing)} are "
            f"not{advice}:\n  " + "\n  ".join(first) + more
        )


def _quantize(graph: Graph, found: Matches, tuned: TunedLayers, folder: Path, dialect: str) -> None:
    from .onnx_graph import OnnxGraph

    if isinstance(graph, OnnxGraph):
        graph.quantize(found.replacements, tuned, folder, dialect)
    else:
        graph.quantize(found.replacements, tuned, folder)


def _prove(graph: Graph, path: Path, found: Matches, artifact: Artifact) -> None:
    """Read every layer back and hold it against the artifact.

    Raises:
        ArtifactError: one is missing, stored twice, or differs.
    """
    left = dict(found.layers)
    for name, linear in _read_back(graph, path, list(found.layers.values())):
        if not linear.equals(artifact.linear(name)):
            raise ArtifactError(f"{path}: the integers of {name} are not those of the artifact")
        left.pop(name, None)
    if left:
        raise ArtifactError(f"{path}: the layer {next(iter(left))} is not in the written graph")


def _read_back(graph: Graph, path: Path, layers: list[Layer]) -> Any:
    if path.suffix == ".onnx":
        from .onnx_graph import read_back

        return read_back(path, layers)
    from .openvino_graph import OpenVinoGraph
    from .openvino_graph import read_back as read_openvino

    assert isinstance(graph, OpenVinoGraph)
    return read_openvino(path, graph.stored())


def _compared(
    path: Path, folder: Path, aside: Path, found: Matches, tuned: TunedLayers, inputs: Mapping[str, NDArray[Any]]
) -> Comparison:
    """The rewritten graph beside the float one with dequantized constants, which is written aside for it."""
    reference = _open(path)
    _put_changed_floats(reference, tuned)
    reference.dequantize(found.replacements, tuned, aside)
    tables = [layer.info.out_features for layer in found.layers.values() if "embedding" in layer.roles]
    vocab = min(tables, default=_smallest_table(reference.constants()))
    half = any("16" in str(piece.reader.edge.dtype) for piece in found.replacements)
    return compare(folder / path.name, aside / path.name, vocab, inputs, half)


def _smallest_table(constants: list[FloatConstant]) -> int:
    """Rows of the smallest table that a Gather reads; token ids below it are known to all."""
    tables = [len(c.view(r.turned)) for c in constants for r in c.readers if r.kind == "embedding"]
    return min(tables, default=2)


def _copy_others(path: Path, folder: Path, graph: Graph) -> None:
    """Copy the files beside a graph, less those that hold its weights."""
    own = {path, path.with_suffix(".bin")} | {path.parent / name for name in _external_files(path)}
    for other in sorted(path.parent.iterdir()):
        if other.is_file() and other not in own and other.name != REPORT:
            shutil.copyfile(other, folder / other.name)


def _external_files(path: Path) -> set[str]:
    if path.suffix != ".onnx":
        return {path.with_suffix(".bin").name}
    from roundexport.runtime.engines._onnx_file import external_files

    return external_files(path)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in {path, *(path.parent / name for name in _external_files(path))})


def _place(piece: Replacement) -> tuple[str, str, tuple[str, ...]]:
    return piece.constant.name, piece.reader.label, tuple(layer.name for layer in piece.layers)


def _report(done: Rewriting, artifact: Artifact) -> dict[str, Any]:
    return {**done.to_json(), "artifact": artifact.digest, "source": artifact.manifest.source["location"]}
