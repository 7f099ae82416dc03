"""What the output check (output_check.py) runs of a package: opened whole, or section by section.

Whole, runs go through the sessions that serve packages. In sections (runtime/sections.py), for what does not fit in
memory, calls are known beforehand: whole prompts, a prompt in two pieces and another one, each then token by token;
rows of unequal length do not step together there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from roundexport.formats.package import PackageManifest
from roundexport.types import VECTORS, output_of

from .pair_outputs import ANSWER, pair_runs

if TYPE_CHECKING:
    from roundexport.runtime.generation import Decoder
    from roundexport.runtime.sections import Stream

Ids = NDArray[np.int64]
Floats = NDArray[np.floating]

_LIBRARIES = {"onnx": "onnxruntime", "openvino": "openvino"}
STEPS, SHORTER = 2, 7  # of a row's tokens, the last that come one by one; how much shorter row 1 is


@dataclass(frozen=True)
class Rows:
    """Token ids [B, S] with what goes with them, or pixels; the rows' lengths; whether an image's vector is meant."""

    inputs: dict[str, Any]
    lengths: tuple[int, ...]
    vector: bool = False

    @property
    def ids(self) -> Ids:
        """Token ids, of what the package answers with."""
        ids: Ids = self.inputs[ANSWER if ANSWER in self.inputs else "input_ids"]
        return ids


@dataclass(frozen=True)
class Found:
    """What the package gave for input ``rows`` at positions ``start`` and on of one row."""

    run: str
    rows: int
    row: int
    start: int
    values: Floats


def package_outputs(
    folder: Path, manifest: PackageManifest, inputs: list[Rows], section_bytes: int | None
) -> tuple[list[Found], str]:
    """What the package gives in float32 throughout, and the name and version of its runtime."""
    from roundexport.runtime.generation import Decoder
    from roundexport.runtime.loading import load
    from roundexport.runtime.seq2seq_package import Seq2SeqPackage

    if section_bytes is not None:
        return list(_in_sections(folder, manifest, inputs, section_bytes)), _engine(manifest)
    package = load(folder, check_hashes=False, precise=True)
    info = package.info()
    found: list[Found] = []
    for number, rows in enumerate(inputs):
        if isinstance(package, Seq2SeqPackage):
            found += [
                Found(run, number, row, start, values) for run, row, start, values in pair_runs(package, rows.inputs)
            ]
        elif isinstance(package, Decoder):
            found += _decoded(package, number, rows)
        else:
            found += _rows_of("", number, rows, package.output(rows.inputs, rows.vector))
    return found, f"{info['library']} {str(info['version']).partition('-')[0]}"


def shipped_outputs(folder: Path, manifest: PackageManifest, rows: Rows, section_bytes: int | None) -> Floats:
    """What the package gives for rows as a whole, with the settings it ships with."""
    from roundexport.runtime.generation import Decoder
    from roundexport.runtime.loading import load
    from roundexport.runtime.seq2seq_package import Seq2SeqPackage

    if section_bytes is not None:
        (found,) = _outputs(folder, manifest, [(rows, _whole(manifest, rows))], section_bytes, precise=False)
        return found[0]
    package = load(folder, check_hashes=False)
    if isinstance(package, Seq2SeqPackage):
        source = {name: values for name, values in rows.inputs.items() if name != ANSWER}
        return package.logits(source, rows.ids)
    return package.logits(rows.ids) if isinstance(package, Decoder) else package.output(rows.inputs)


def _in_sections(folder: Path, manifest: PackageManifest, inputs: list[Rows], size: int) -> Iterator[Found]:
    """The runs of a package that is not opened whole."""
    from roundexport.runtime.sections import token_stream

    plans: list[tuple[str, int, int, list[int], Rows, Stream]] = []  # run, number, row, starts, rows, stream
    for number, rows in enumerate(inputs):
        plans.append(("a whole prompt", number, 0, [0], rows, _whole(manifest, rows)))
        if manifest.task != "generate":
            continue
        length = rows.ids.shape[1]
        for row in range(len(rows.lengths)):
            begun = max(1, length - STEPS - (SHORTER if row else 0))
            third = max(1, length // 3)
            ends = [*([third] if row == 0 and third < begun else []), *range(begun, length + 1)]
            run = "a prompt in two pieces, then token by token" if row == 0 else "a shorter prompt, then token by token"
            plans.append((run, number, row, [0, *ends[:-1]], rows, token_stream(rows.ids[row : row + 1], ends)))
    given = _outputs(folder, manifest, [(plan[4], plan[5]) for plan in plans], size, precise=True)
    for (run, number, row, starts, rows, _), calls in zip(plans, given, strict=True):
        if len(starts) == 1:
            yield from _rows_of(run if manifest.task == "generate" else "", number, rows, calls[0])
            continue
        for start, values in zip(starts, calls, strict=True):
            yield Found(run, number, row, start, values[0])


def _outputs(
    folder: Path, manifest: PackageManifest, streams: list[tuple[Rows, Stream]], size: int, precise: bool
) -> Iterator[list[Floats]]:
    """The wanted output of every call of every stream."""
    from roundexport.environment.threads import choose_threads
    from roundexport.runtime.sections import run_in_sections
    from roundexport.runtime.types import EngineOptions

    options = EngineOptions(threads=choose_threads(None).count, precise=precise)
    output = output_of(manifest.task, manifest.pooling)
    found = run_in_sections(folder, manifest, options, size, [stream for _, stream in streams])
    for (rows, _), calls in zip(streams, found, strict=True):
        vector = next((name for name in VECTORS if name in calls[0]), output) if rows.vector else output
        yield [call[vector] for call in calls]


def _whole(manifest: PackageManifest, rows: Rows) -> Stream:
    from roundexport.runtime.sections import Stream, token_stream

    return token_stream(rows.ids, [rows.ids.shape[1]]) if manifest.task == "generate" else Stream([rows.inputs])


def _engine(manifest: PackageManifest) -> str:
    library = _LIBRARIES[manifest.target]
    return f"{library} {version(library)}, in sections"


def _decoded(decoder: Decoder, number: int, rows: Rows) -> Iterator[Found]:
    ids = rows.ids
    length = ids.shape[1]
    yield from _rows_of("a whole prompt", number, rows, decoder.logits(ids))
    ends = [max(1, length - STEPS - (SHORTER if row else 0)) for row in range(len(ids))]
    runs = [("a batch of unequal rows", ids, [ends])]
    if len(ids) > 1:
        runs.append(("a prompt in two pieces", ids[:1], [[max(1, length // 3)], [ends[0]]]))
    for run, chosen, pieces in runs:
        yield from _stepwise(decoder, f"{run}, then token by token", number, chosen, pieces)


def _stepwise(decoder: Decoder, run: str, number: int, ids: Ids, pieces: list[list[int]]) -> Iterator[Found]:
    """Rows appended up to the ends that each piece names, then one token at a time."""
    places = [0] * len(ids)
    with decoder.start(rows=len(ids)) as session:
        numbers = session.add(len(ids))
        for ends in pieces:
            given = [row[begin:end].tolist() for row, begin, end in zip(ids, places, ends, strict=True)]
            if not all(given):
                continue
            places = ends
            for row, values in enumerate(session.extend(dict(zip(numbers, given, strict=True))).copy()):
                yield Found(run, number, row, places[row] - 1, values[None])
        while max(places) < ids.shape[1]:
            new = {number: [int(ids[row, places[row]])] for row, number in enumerate(numbers)}
            values = session.extend(new).copy()
            for row in range(len(ids)):
                yield Found(run, number, row, places[row], values[row][None])
            places = [place + 1 for place in places]


def _rows_of(run: str, number: int, rows: Rows, found: Floats) -> Iterator[Found]:
    """What a run of whole rows gave, row by row, without what is behind the end of one."""
    usual = "a padded batch" if len(set(rows.lengths)) > 1 else "a single row" if len(rows.lengths) == 1 else "a batch"
    for row, values in enumerate(found):
        yield Found(run or usual, number, row, 0, values[: rows.lengths[row]] if values.ndim > 1 else values[None])
