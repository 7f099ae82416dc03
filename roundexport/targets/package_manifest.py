"""What every target's `roundexport.json` says in the same way: the model's half of the manifest.

    from the checkpoint   task, type, special tokens, pooling
    from the capture      vocabulary, width, attention layers with a cache
    from the artifact     where the integers come from
    from the target       how layers are stored, what stayed float, fusions, settings, versions

A target adds its own half and calls :func:`package_manifest` once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from roundexport.formats.artifact import Artifact
from roundexport.formats.package import PackageLayer, PackageManifest, package_source
from roundexport.model.vision_part import feature_width
from roundexport.types import HEADLESS, OF_IMAGES, PAIRS, POOLED, KvLayer, Pooling

if TYPE_CHECKING:
    from roundexport.graph.capture import Capture
    from roundexport.model.checkpoint import Checkpoint


INTEGER_INPUTS = "integer_inputs"
"""The setting that says that linears read eight-bit integers, in formats that the artifact settled."""


@dataclass(frozen=True)
class TargetHalf:
    """What a target says of its own package.

    Args:
        target: its name.
        model_file: the graph's file.
        settings: its settings, as JSON.
        layers: the quantized layers, see :func:`package_layers`.
        float_layers: reason by name of every linear and embedding of the model that is in the graph as float.
        fusions: rewrite rule -> number of places.
        versions: library -> version, of the libraries that made the graph.
        cache_widths: width of each attention layer's cache, where it is not that of its keys.
    """

    target: Literal["onnx", "openvino"]
    model_file: str
    settings: dict[str, Any]
    layers: dict[str, PackageLayer]
    float_layers: Mapping[str, str]
    fusions: Mapping[str, int]
    versions: dict[str, str]
    cache_widths: tuple[int, ...] | None = None


def package_manifest(artifact: Artifact, checkpoint: Checkpoint, captured: Capture, own: TargetHalf) -> PackageManifest:
    """The whole manifest.

    Args:
        artifact: the tuned layers.
        checkpoint: the float model they came from.
        captured: its graph.
        own: the target's half.
    """
    cached = captured.task == "generate" or captured.task in PAIRS
    config = captured.config.get_text_config()
    own_vocabulary = getattr(config, "decoder_vocab_size", None) if captured.task in PAIRS else None
    return PackageManifest(
        target=own.target,
        task=checkpoint.task,
        model_file=own.model_file,
        model_type=checkpoint.model_type,
        kv=kv_layers(captured, own.cache_widths) if cached else (),
        vocab_size=0 if checkpoint.task in OF_IMAGES else int(own_vocabulary or config.vocab_size),
        hidden_size=_width(checkpoint, captured, int(config.hidden_size)),
        max_context=captured.max_context,
        tokens=checkpoint.tokens,
        pooling=_pooling(checkpoint, captured) if checkpoint.task in HEADLESS else None,
        settings=own.settings,
        source=package_source(artifact),
        layers=own.layers,
        kept_float=kept_float(artifact, captured, own.float_layers),
        fusions=dict(sorted(own.fusions.items())),
        versions=own.versions,
    )


def _pooling(checkpoint: Checkpoint, captured: Capture) -> Pooling:
    """By the folder's files, but where the graph gives the vector."""
    if captured.output == POOLED:
        return {"mode": "graph", "normalize": False}
    return {"mode": "head", "normalize": False} if captured.beside else checkpoint.pooling()


def _width(checkpoint: Checkpoint, captured: Capture, hidden_size: int) -> int:
    """Width of hidden states, or of what comes out instead: vectors, features for a language model."""
    if checkpoint.part == "vision" and (features := feature_width(checkpoint.config)):
        return features
    return checkpoint.embedding_head().width(hidden_size) if captured.output == POOLED else hidden_size


def kv_layers(captured: Capture, widths: tuple[int, ...] | None = None) -> tuple[KvLayer, ...]:
    """Attention layers with a cache, in the order in which packages number them.

    Args:
        captured: the model's graph.
        widths: of their caches; None: of their keys.
    """
    cached = [info for info in captured.attentions if info.kind == "cached"]
    widths = widths or tuple(info.head_dim for info in cached)
    return tuple(
        {"layer": place, "num_kv_heads": info.num_kv_heads, "head_dim": width}
        for place, (info, width) in enumerate(zip(cached, widths, strict=True))
    )


def package_layers(artifact: Artifact, stored: Mapping[str, str]) -> dict[str, PackageLayer]:
    """What a manifest says of every artifact layer.

    Args:
        artifact: the tuned layers.
        stored: the target's name of the form each is in.
    """
    specs = {name: artifact.entry(name).spec for name in artifact.names()}
    return {
        name: {
            "bits": spec.bits, "group_size": spec.group_size, "symmetric": spec.symmetric, "stored": stored[name],
        }
        for name, spec in specs.items()
    }  # fmt: skip


def kept_float(artifact: Artifact, captured: Capture, float_layers: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """(module, reason) of every linear and embedding of the model that is not quantized.

    Args:
        artifact: the tuned layers; its own reason counts first.
        captured: the model's graph.
        float_layers: the target's reason by name, of those in its graph.
    """
    reasons = dict(artifact.manifest.kept_float)
    quantized = {name for layer in artifact.names() for name in (layer, *artifact.entry(layer).info.shared_with)}
    unused = f"{captured.output} does not depend on it"
    return tuple(
        (info.name, reasons.get(info.name, float_layers[info.name]) if info.name in float_layers else unused)
        for info in (*captured.linears, *captured.embeddings)
        if info.name not in quantized
    )
