"""The manifest of a package, `roundexport.json`: what a runtime must know beside the graph, and the hash of every file.

Targets write it last, with `write_manifest`; the runtime reads it first, with `read_package`, which checks every file
before anything in it is used.  The format is specified in FORMAT.md; JSON is read strictly (strict_json.py).
Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from roundexport.errors import ArtifactError
from roundexport.quant.spec import BITS
from roundexport.storage.atomic import replace_file
from roundexport.storage.checksums import FileEntry, check_files, file_entry, read_manifest
from roundexport.storage.paths import is_plain_name
from roundexport.storage.strict_json import decode, encode, parse_format
from roundexport.types import HEADLESS, OF_IMAGES, PAIRS, KvLayer, Pooling, Task

if TYPE_CHECKING:
    from .artifact import Artifact

MANIFEST = "roundexport.json"
FORMAT = "roundexport-package/1"
VISION = "vision"  # the setting that holds the manifest of a graph that reads pictures
SIGHT = "sight"  # the setting that holds how far answers about a picture are from the whole model's
LAYERS_KEY = "roundexport.layers"
"""Key of an ONNX node's metadata: a JSON list of the layers that it computes, each with its name first."""
_CACHED = ("generate", *PAIRS)  # tasks whose graph has a KV cache


class Tokens(TypedDict):
    """Token ids with a meaning; generation stops at any of ``eos``."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None


class PackageSource(TypedDict):
    """What the package was made from: the model, the sha256 of the artifact's manifest, the text it was tuned on."""

    location: str
    digest: str
    artifact: str
    calibration: dict[str, Any]


class PackageLayer(TypedDict):
    """One quantized layer; ``stored`` is the target's own name for the form it is in."""

    bits: int
    group_size: int | None
    symmetric: bool
    stored: str


@dataclass(frozen=True)
class PackageManifest:
    """Everything in `roundexport.json`.

    Args:
        target: the runtime the graph is for.
        task: what comes out of the graph for token ids, see types.py; labels of heads are in the folder's config.json.
        model_file: the graph, relative to the folder; of a model with an encoder the decoder's, which the encoder's is
            beside.
        model_type: ``model_type`` of the source's config.
        kv: a decoder's attention layers; empty for an encoder, and for a decoder that has none.  Cross-attention has as
            many, of the same sizes.
        vocab_size: width of the logits; 0 of a package of images.
        hidden_size: width of the hidden states.
        max_context: longest sequence, prompt and output together; positions that an image becomes.
        tokens: special token ids.
        pooling: how a package that embeds pools, else None.
        settings: the target's settings, as JSON.
        source: model, artifact and calibration that the integers come from.
        layers: quantized layers by artifact name.
        kept_float: (layer, reason) of every linear or embedding that is not quantized.
        fusions: rewrite rule -> number of places.
        versions: library -> version, of the libraries that made the graph.
        files: every other file of the folder; filled in by :func:`write_manifest`.
    """

    target: Literal["onnx", "openvino"]
    task: Task
    model_file: str
    model_type: str
    kv: tuple[KvLayer, ...]
    vocab_size: int
    hidden_size: int
    max_context: int
    tokens: Tokens
    pooling: Pooling | None
    settings: dict[str, Any]
    source: PackageSource
    layers: dict[str, PackageLayer]
    kept_float: tuple[tuple[str, str], ...]
    fusions: dict[str, int]
    versions: dict[str, str]
    files: dict[str, FileEntry] = field(default_factory=dict)
    format: str = FORMAT

    def to_json(self) -> dict[str, Any]:
        """The manifest as a JSON object."""
        return asdict(self)


def write_manifest(folder: Path, manifest: PackageManifest) -> PackageManifest:
    """Hash every file of a finished package folder and write its manifest.

    Args:
        folder: the package; everything in it but the manifest becomes part of ``files``.
        manifest: what to write; its ``files`` are ignored.

    Returns:
        The manifest as written.

    Raises:
        ArtifactError: the folder holds something that is no plain file, or the manifest contradicts itself.
    """
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir()]
    for name in names:
        if (folder / name).is_symlink() or not (folder / name).is_file() or not is_plain_name(name):
            raise ArtifactError(f"{folder}: {name!r} cannot be part of a package; only plain files can")
    files = {name: file_entry(folder / name) for name in names if name != MANIFEST}
    written = replace(manifest, files=files)
    data = encode(written)
    _decode(data, str(folder / MANIFEST))
    replace_file(folder / MANIFEST, data)
    return written


def read_package(folder: str | Path, check_hashes: bool = True) -> PackageManifest:
    """Read and check a package's manifest.

    Args:
        folder: the package.
        check_hashes: also hash every file; sizes are checked in any case.

    Raises:
        ArtifactError: no manifest, another format, an unknown or missing key, a value that makes no sense, or a
            file that is missing, changed, or outside the folder.
    """
    folder = Path(folder)
    manifest = _decode(read_manifest(folder, MANIFEST, "a package"), str(folder / MANIFEST))
    check_files(folder, manifest.files, check_hashes)
    return manifest


def vision_manifest(manifest: PackageManifest) -> PackageManifest | None:
    """What a package of a language model says of the graph beside it that reads pictures; None where there is none.

    It is the manifest of that graph's own package, under ``vision`` of the settings; files are those of the whole.

    Raises:
        ArtifactError: it breaks the format.
    """
    given = manifest.settings.get(VISION)
    if given is None:
        return None
    where = f"{MANIFEST}, settings.{VISION}"
    found = replace(decode(PackageManifest, given, where), files=manifest.files)
    for problem in _problems(found):
        raise ArtifactError(f"{where}: {problem}")
    return found


def package_source(artifact: Artifact) -> PackageSource:
    """What a package made from this artifact says of its source."""
    manifest = artifact.manifest
    return {
        "location": manifest.source["location"],
        "digest": manifest.source["digest"],
        "artifact": artifact.digest,
        "calibration": manifest.calibration,
    }


def _decode(data: bytes, where: str) -> PackageManifest:
    manifest = decode(PackageManifest, parse_format(data, FORMAT, where), where)
    for problem in _problems(manifest):
        raise ArtifactError(f"{where}: {problem}")
    return manifest


def _problems(manifest: PackageManifest) -> Iterator[str]:
    """What in a well-formed manifest makes no sense."""
    if manifest.model_file not in manifest.files:
        yield f"model_file {manifest.model_file!r} is not among the files"
    if MANIFEST in manifest.files:
        yield "the manifest lists itself"
    if manifest.task in _CACHED and manifest.pooling is not None:
        yield "a package that generates has no pooling"
    if manifest.task in PAIRS and not manifest.kv:
        yield "a package that answers a source needs kv"
    if manifest.task in HEADLESS and (manifest.pooling is None or manifest.kv):
        yield "a package that embeds needs pooling and has no kv"
    if manifest.task not in (*_CACHED, *HEADLESS) and (manifest.pooling is not None or manifest.kv):
        yield "a package with a head has neither pooling nor kv"
    sizes = [manifest.hidden_size, manifest.max_context, *([] if manifest.task in OF_IMAGES else [manifest.vocab_size])]
    sizes += [size for layer in manifest.kv for size in (layer["num_kv_heads"], layer["head_dim"])]
    if min(sizes) < 1:
        yield "sizes must be positive"
    layers = [layer["layer"] for layer in manifest.kv]
    if layers != sorted(set(layers)):
        yield "kv must list its layers once each, in order"
    for name, layer in manifest.layers.items():
        if layer["bits"] not in BITS or (layer["group_size"] is not None and layer["group_size"] < 1):
            yield f"layer {name} has impossible bits or group_size"
