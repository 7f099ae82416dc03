"""What was done and with what, in pairs: the page's and the card's account of a package."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from roundexport.formats.package import SIGHT
from roundexport.quant.spec import QuantSpec

from .accuracy import text_of
from .components import components
from .layers import grids
from .numbers import Pairs, at, flat, joined, number, short
from .records import PackageRecord, Timing

_SPEECH = {
    "none": "none: the method looks at no text",
    "self": "written by the model itself",
    "text": "a text file",
    "dataset": "a data set",
}
_MEASURES = {"gram": "share of the layer's output energy that is lost, over the calibration tokens"}
_BLOCK = "mean squared error of the block's output over the calibration tokens"


def measure_of(record: PackageRecord) -> str:
    """What the losses of a record's layers measure."""
    name = "" if record.artifact is None else record.artifact.algorithm["name"]
    polished = record.artifact is not None and record.artifact.algorithm["settings"].get("steps")
    return _BLOCK if polished else _MEASURES.get(name, _BLOCK)


def schemes(record: PackageRecord) -> list[tuple[str, int]]:
    """Every scheme with the number of layers in it, the most frequent first; float last."""
    said = [_scheme(layer) for layer in record.manifest.layers.values()]
    kept = len(record.manifest.kept_float)
    return [*Counter(said).most_common(), *([("float", kept)] if kept else [])]


def outside(record: PackageRecord) -> str:
    """Quantized layers outside the blocks, token embedding and lm_head before all, with their schemes."""
    layers = record.manifest.layers
    return ", ".join(f"{name} {_scheme(layers[name])}" for name in grids(layers)[1])


def _scheme(layer: Mapping[str, Any]) -> str:
    return QuantSpec(layer["bits"], layer["group_size"], layer["symmetric"]).describe()


def made(record: PackageRecord) -> Pairs:
    """How the package was made."""
    manifest, artifact = record.manifest, record.artifact
    pairs = [("model", f"{record.source.name} ({manifest.model_type})")]
    if artifact is not None:
        settings = artifact.algorithm["settings"]
        pairs.append(("method", ": ".join(filter(None, [artifact.algorithm["name"], flat(settings)]))))
        for step, told in (("transform", "transformed before"), ("finish", "tuned as a whole after")):
            if isinstance(settings.get(step), Mapping):
                pairs.append((told, _step(settings[step])))
    pairs.append(("tuned on", _calibration(manifest.source["calibration"])))
    if record.verification is not None:
        pairs.append(("verified on", f"{text_of(record.verification)}, held out: not what it was tuned on"))
    pairs.append(("schemes", ", ".join(f"{name} ×{count}" for name, count in schemes(record))))
    if tables := outside(record):
        pairs.append(("outside the blocks", tables))
    if record.source.license is not None:
        pairs.append(
            ("license", f"{record.source.license_name or record.source.license}, as {record.source.said_by} says")
        )
    pairs.append(("model's sha256", manifest.source["digest"]))
    pairs.append(("artifact's sha256", manifest.source["artifact"]))
    return pairs


def exported(record: PackageRecord) -> Pairs:
    """What is the package's own: target, settings, what runs how, fusions."""
    manifest = record.manifest
    fused = ", ".join(f"{rule} ×{count}" for rule, count in manifest.fusions.items())
    spared = manifest.settings.get("float32_activations") or ()
    return [
        ("target", manifest.target),
        ("longest sequence", f"{manifest.max_context:,} tokens"),
        ("settings", flat(manifest.settings) or "none"),
        *([("activations in float32", ", ".join(spared))] if spared else []),
        *components(manifest),
        ("fused", fused or "nothing"),
        *([("shown a picture", _sight(seen))] if isinstance(seen := manifest.settings.get(SIGHT), Mapping) else []),
    ]


def _sight(found: Mapping[str, Any]) -> str:
    """How far a joined package's answer about a picture was from the whole model's."""
    difference, tokens = number(found.get("difference")), number(found.get("tokens"))
    if difference is None or tokens is None:
        return f"not compared with the whole model: {found.get('why') or 'not recorded'}"
    return (
        f"logits within {difference:.1e} standard deviations of the whole dequantized model's, over {tokens:.0f} tokens"
    )


def environment(record: PackageRecord) -> Pairs:
    """Versions and the engine that the figures were taken with."""
    versions = {} if record.artifact is None else record.artifact.versions
    pairs = [("tuned with", _versions(versions))] if versions else []
    pairs.append(("exported with", _versions(record.manifest.versions)))
    engine = at(record.verification, "engine")
    if isinstance(engine, Mapping):
        pairs.append(("verified with", engine_line(engine)))
    return pairs


def machine(timing: Timing) -> Pairs:
    """The machine of a benchmark."""
    found = timing.machine
    sets = found.get("instruction_sets")
    bandwidth = number(found.get("read_bandwidth_gbps"))
    pairs = [
        (
            "processor",
            joined(
                [str(found.get("cpu", "not recorded")), " ".join(map(str, sets)) if isinstance(sets, list) else None]
            ),
        ),
        ("threads", str(timing.settings.get("threads", "not recorded"))),
        ("rounds", f"{timing.settings.get('rounds', '?')}, contestants in turn, medians"),
    ]
    if bandwidth is not None:
        pairs.append(("memory reads", f"{short(bandwidth)} GB/s measured"))
    system = joined(
        [str(found[key]) for key in ("os", "system", "kernel", "python") if isinstance(found.get(key), str)]
    )
    return [*pairs, *([("system", system)] if system else [])]


def engine_line(engine: Mapping[str, Any]) -> str:
    """What an engine says of itself."""
    precision = engine.get("precision")
    threads = number(engine.get("threads"))
    return joined(
        [
            f"{engine.get('library', engine.get('engine', ''))} {engine.get('version', '')}".strip(),
            str(engine["device"]) if "device" in engine else None,
            None if threads is None else f"{threads:.0f} thread{'' if threads == 1 else 's'}",
            flat(precision) if isinstance(precision, Mapping) else None,
        ]
    )


def _step(step: Mapping[str, Any]) -> str:
    losses = step.get("losses")
    told = flat({**step, **(step.get("settings") or {}), "name": None})
    said = ": ".join(filter(None, [str(step.get("name", "")), told]))
    pairs = losses if isinstance(losses, list) and losses and isinstance(losses[0], list) else [losses]
    moves = [f"{short(number(p[0]))} → {short(number(p[1]))}" for p in pairs if isinstance(p, list) and len(p) == 2]
    return said + (f"; loss {', '.join(moves)}" if moves else "")


def _calibration(found: Mapping[str, Any]) -> str:
    said = _source(found)
    if isinstance(parts := found.get("parts"), list):
        said = " and ".join(_part(part) for part in parts if isinstance(part, Mapping))
    count, length = number(found.get("num_samples")), number(found.get("sample_len"))
    amount = None if count is None or length is None else f"{count:.0f} samples of {length:.0f} tokens"
    told = ("kind", "num_samples", "sample_len", "ids_sha256", "chat_template")
    rest = {k: v for k, v in found.items() if k not in told}
    names = {k: v.rpartition("/")[2] if isinstance(v, str) and v.startswith("/") else v for k, v in rest.items()}
    return joined([said, amount, flat(names)])


def _source(found: Mapping[str, Any]) -> str:
    """What text is from, and how conversations were read."""
    kind = str(found.get("kind", "none"))
    template = found.get("chat_template")
    read = {None: "", "none": " of conversations, as plain text"}.get(
        template, " of conversations, in the chat template"
    )
    return _SPEECH.get(kind, kind) + read


def _part(found: Mapping[str, Any]) -> str:
    """A part of a mixture: its share, what it is, and its name."""
    share, name = number(found.get("share")), found.get("file") or found.get("dataset")
    amount = "" if share is None else f"{100 * share:.0f} % "
    return f"{amount}{_source(found)}{f' ({name})' if name else ''}"


def _versions(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())
