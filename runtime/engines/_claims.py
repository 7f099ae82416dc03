"""What a package's manifest says of its graph, held against the graph when the package is opened.

The manifest is the one file that no hash covers.  A cache of other heads, a larger vocabulary or a longer context than
the graph's would end in a raw error at the first use, in tokens that do not exist, or in positions beyond the rotary
table: numbers out of other memory.

    kv              (layer, heads, width) of each key cache      the graph's cache inputs or state variables
    vocab_size      width of the logits                          hidden_size: width of an encoder's output
    id2label        of config.json: width of a head's logits
    max_context     rows of the rotary table, where the graph has one; and the positions that config.json names
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from roundexport.errors import ArtifactError
from roundexport.formats.package import MANIFEST, PackageManifest
from roundexport.runtime.labels import read_labels
from roundexport.runtime.tokenizer import read_json
from roundexport.types import HEADLESS, WITHOUT_TOKENS

CACHE = re.compile(r"past_key_values\.(\d+)\.(?:decoder\.)?key")
"""Name of a key cache, and in it the layer."""


@dataclass(frozen=True)
class GraphShapes:
    """What a graph itself says; None: it leaves that open.

    Args:
        keys: layer -> (heads, width) of its key cache.
        width: of its output: logits, or an encoder's hidden states.
        positions: rows of the rotary table.
    """

    keys: Mapping[int, tuple[int | None, int | None]]
    width: int | None
    positions: int | None = None


def size(value: object) -> int | None:
    """A dimension, where it is a fixed number."""
    return value if isinstance(value, int) and value >= 0 else None


def key_caches(shapes: Iterable[tuple[str, tuple[object, ...]]]) -> dict[int, tuple[int | None, int | None]]:
    """Key caches [B, heads, T, width] among named shapes."""
    found = ((CACHE.search(name), shape) for name, shape in shapes)
    return {int(match[1]): (size(shape[1]), size(shape[3])) for match, shape in found if match and len(shape) == 4}


def check_claims(manifest: PackageManifest, graph: GraphShapes, folder: Path) -> None:
    """Refuse a manifest that describes another graph.

    Raises:
        ArtifactError: with every difference.
    """
    problems = [*_cache_problems(manifest, graph), *_size_problems(manifest, graph, folder)]
    if problems:
        raise ArtifactError(
            f"{folder / MANIFEST} does not describe {manifest.model_file}: {'; '.join(problems)}; export again"
        )


def _cache_problems(manifest: PackageManifest, graph: GraphShapes) -> Iterator[str]:
    claimed = {layer["layer"]: (layer["num_kv_heads"], layer["head_dim"]) for layer in manifest.kv}
    if claimed.keys() != graph.keys.keys():
        yield f"kv names layers {sorted(claimed)}, the graph has caches of {sorted(graph.keys)}"
        return
    for layer, (heads, width) in claimed.items():
        found = graph.keys[layer]
        if any(has is not None and has != says for has, says in zip(found, (heads, width), strict=True)):
            yield f"kv layer {layer} says {heads} heads of {width}, the graph has {found[0]} of {found[1]}"


def _size_problems(manifest: PackageManifest, graph: GraphShapes, folder: Path) -> Iterator[str]:
    if manifest.task in ("classify", "tag", "classify_image"):
        path = folder / "config.json"
        config = read_json(path) if path.name in manifest.files else {}
        name, claimed = "id2label of config.json", len(read_labels(config, str(path)).names)
    elif manifest.task == "answer":
        name, claimed = "a head for answers", 2
    elif manifest.task == "rerank":
        name, claimed = "a reranker's score", 1
    elif manifest.task in HEADLESS:
        name, claimed = "hidden_size", manifest.hidden_size
    else:
        name, claimed = "vocab_size", manifest.vocab_size
    if graph.width is not None and claimed != graph.width:
        yield f"{name} says {claimed}, the graph gives {graph.width}"
    if graph.positions is not None and manifest.max_context > graph.positions:
        yield f"max_context says {manifest.max_context}, the graph's rotary table has {graph.positions} positions"
    elif manifest.task in WITHOUT_TOKENS:
        return  # positions are patches or frames, of which config.json does not speak
    elif (most := _model_positions(manifest, folder)) is not None and manifest.max_context > most:
        yield f"max_context says {manifest.max_context}, the model's config.json {most} positions"


def _model_positions(manifest: PackageManifest, folder: Path) -> int | None:
    """Positions that the model was made for, where the package has its config."""
    config = read_json(folder / "config.json") if "config.json" in manifest.files else {}
    text = config.get("text_config")
    for part in (text if isinstance(text, dict) else {}, config):
        for key in ("max_target_positions", "max_position_embeddings", "n_positions"):
            if (found := size(part.get(key))) is not None:
                return found
    return None
