"""One contestant of a benchmark, in its own process: reads requests, answers with times; one JSON object per line.

    request                                             reply
    {"do": "load"}                                      {"load_ms", "task", "vocab_size", "max_context",
                                                         "weight_bytes", "kl", "kl_over", "info",
                                                         "profiles", "choice"}
    {"do": "generate", "prompt": [ids], "output_len",   {"first_ms", "step_ms": [output_len - 1 gaps],
     and "others": [[ids], …] to answer with it}         "tokens": [ids of the first]};
                                                         for a tool that tells no more: {"first_ms", "tpot_ms"}
    {"do": "embed", "batch": [[ids], …]}                {"ms", "sha256"}; of heads, their logits
    {"do": "profile", and what "generate" has}          {"prefill" and "decode": {"total_ms", "operators": {name: ms}}},
                                                         not of rivals
    {"do": "quit"}                                      none; the process ends
    any of these may add                                 "peak_rss": bytes of children that have ended
    anything that fails                                 {"error": "what went wrong"}

Anything that speaks this can take part (contestants.py): end-of-sequence is ignored, choice is greedy,
times are milliseconds from the moment the request was read, tokens in and tokens out (no text).  ``weight_bytes`` is
what one decode step must read, or null; ``info`` is free, and says engine, version, threads and precisions; ``kl``,
``profiles`` (whether it answers ``profile``) and ``choice`` (why this engine) may be left out.  Requests
come from standard input; replies go to what was standard output at the start, which is then turned to standard error,
so that a library's chatter does not get between.

`serve` holds the loop; rivals written elsewhere pass it their own three functions.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from roundexport.errors import RoundexportError, UnsupportedError
from roundexport.formats.package import PackageManifest
from roundexport.formats.verification_record import read_record
from roundexport.runtime.embedding import Encoder
from roundexport.runtime.frame_transcription import FrameTranscriber
from roundexport.runtime.generation import Decoder
from roundexport.runtime.image_package import ImagePackage
from roundexport.runtime.loading import load
from roundexport.runtime.seq2seq_package import Seq2SeqPackage
from roundexport.runtime.types import EngineOptions

from .generating import timed_generation
from .profiling import profile_package, profiles

Reply = dict[str, Any]
_HEADS = {"lm_head", "embed_out"}
_TABLES = {"embed_tokens", "wte", "word_embeddings", "embed_in"}


def serve(
    load: Callable[[], Reply],
    generate: Callable[..., Reply],
    embed: Callable[[Any], Reply],
    profile: Callable[[Reply], Reply] | None = None,
) -> None:
    """Answer requests until ``quit`` or the end of input.

    Args:
        load: opens the contestant; ``load_ms`` is added here.
        generate: (prompt ids, number of tokens) -> reply; with other prompts as a third where they are asked for.
        embed: batch of ids -> reply.
        profile: request -> reply, after which nothing else is asked; None: this contestant has no profile.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "quit":
            return
        try:
            if request["do"] == "load":
                began = time.perf_counter()
                reply = load()
                reply = {"load_ms": (time.perf_counter() - began) * 1e3, **reply}
            elif request["do"] == "generate":
                others = [request["others"]] if "others" in request else []
                reply = generate(request["prompt"], request["output_len"], *others)
            elif request["do"] == "profile" and profile is not None:
                reply = profile(request)
            else:
                reply = embed(request["batch"])
        except Exception as error:  # whatever a rival's library raises becomes the benchmark's error
            reply = {"error": str(error) if isinstance(error, RoundexportError) else f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


def decode_bytes(manifest: PackageManifest) -> int:
    """Bytes of weights that one decode step reads, by the sizes of the files.

    The graph's weight file, less the embedding table where the output layer has weights of its own: of the table one
    row is read.  An estimate: scales are taken as two bytes, float tables as four bytes a weight.
    """
    stem = manifest.model_file.rpartition(".")[0]
    weights = {f"{manifest.model_file}.data", f"{stem}.bin", f"{stem}.data"}
    if manifest.target == "onnx":
        weights.add(manifest.model_file)  # small weights are inside
    total = sum(entry["size"] for name, entry in manifest.files.items() if name in weights)
    names = [*manifest.layers, *(name for name, _ in manifest.kept_float)]
    heads = [name for name in names if name.rpartition(".")[2] in _HEADS]
    tables = [name for name in names if name.rpartition(".")[2] in _TABLES]
    if not heads or not tables:
        return total
    layer = manifest.layers.get(tables[0])
    bytes_each = 4.0 if layer is None else layer["bits"] / 8 + 2 / (layer["group_size"] or manifest.hidden_size)
    return max(0, total - int(manifest.vocab_size * manifest.hidden_size * bytes_each))


def main(arguments: str) -> None:
    """Serve one package; ``arguments`` is a JSON object with the parameters of `load`."""
    opened: list[Any] = []
    names: list[str] = []
    options = json.loads(arguments)

    def open_package() -> Reply:
        engine = load(**options)
        if isinstance(engine, ImagePackage | FrameTranscriber):
            raise UnsupportedError(f"{options['package']} reads images or sounds; packages of text are timed")
        manifest = engine.manifest
        if isinstance(engine, Seq2SeqPackage):
            raise UnsupportedError(f"a package whose task is {manifest.task} is not timed; decoders and encoders are")
        opened.append(engine)
        return {
            "task": manifest.task,
            "vocab_size": manifest.vocab_size,
            "max_context": manifest.max_context if isinstance(engine, Decoder) else engine.max_length,
            "weight_bytes": decode_bytes(manifest) if isinstance(engine, Decoder) else None,
            **_kl(Path(options["package"])),
            "info": {**engine.info(), "package": Path(options["package"]).name},
            "profiles": profiles(engine),
            "choice": engine.choice.why if engine.choice and options.get("engine", "auto") == "auto" else None,
        }

    def embed(batch: list[list[int]]) -> Reply:
        began = time.perf_counter()
        engine = opened[0]
        given = isinstance(engine, Encoder)
        vectors = engine.embed_ids(batch, len(batch)) if given else engine.output(engine.padded(batch, None))
        ms = (time.perf_counter() - began) * 1e3
        return {"ms": ms, "sha256": hashlib.sha256(np.ascontiguousarray(vectors).tobytes()).hexdigest()}

    def generate(prompt: list[int], count: int, others: Sequence[Sequence[int]] = ()) -> Reply:
        return timed_generation(opened[0], prompt, count, others)

    def profile(request: Reply) -> Reply:
        told = EngineOptions(
            options.get("device", "CPU"), options.get("threads"), options.get("precise", False),
            options.get("properties") or {}, profile=True,
        )  # fmt: skip
        if opened:
            names.append(opened.pop().info()["engine"])  # one copy at a time: it is opened anew, with its profile
        return profile_package(options["package"], names[0], told, request)

    serve(open_package, generate, embed, profile)


def _kl(package: Path) -> Reply:
    """Mean KL to the float model in nats, and over what, where `verify` has found it for this very package."""
    record = read_record(package) or {}
    quality: Reply = record["quality"] if isinstance(record.get("quality"), dict) else {}
    found = quality.get("kl")
    if not isinstance(found, dict) or "mean" not in found:
        return {"kl": None, "kl_over": None}
    text, windows, tokens = Path(str(record.get("text"))).name, quality.get("windows"), quality.get("tokens")
    known = f" {str(digest)[:8]}" if (digest := record.get("text_sha256")) else ""
    shape = f"{windows} × {tokens // windows} tokens" if windows and tokens else f"{quality.get('texts')} texts"
    return {"kl": float(found["mean"]), "kl_over": f"{text}{known}, {shape}"}


if __name__ == "__main__":
    main(sys.argv[1])
