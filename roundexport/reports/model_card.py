"""The model card of a package: README.md in Hugging Face's form, with the figures of the report.

    ---
    license, base_model, base_model_relation, language    as the source says them (provenance.py), or absent
    library_name, pipeline_tag, tags, quantized_by         what the package is
    ---
    what it is · how to use it · what was lost · how it was made · what stands in which bits · speed · environment

Values of the front matter are written as JSON strings, which YAML reads as they are.  A license that nobody states is
not guessed: the card says that it is unknown.  Paths of the machine that made the package are left out.
Source: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from roundexport.kernels.native.library import COMMAND
from roundexport.types import HEADLESS, KERNELS, Task

from . import accuracy, story
from .layer_plots import bits_of, losses_of, losses_told, summary
from .numbers import Pairs, mebibytes, number, short
from .records import PackageRecord

_TASKS: dict[Task, str] = {
    "generate": "text-generation",
    "embed": "feature-extraction",
    "classify": "text-classification",
    "rerank": "text-ranking",
    "tag": "token-classification",
    "fill": "fill-mask",
    "answer": "question-answering",
    "embed_image": "image-feature-extraction",
    "classify_image": "image-classification",
    "translate": "translation",
    "transcribe": "automatic-speech-recognition",
    "ctc": "automatic-speech-recognition",
}
_CLIENTS = {
    "onnx": ("onnxruntime-genai", "genai_config.json"),
    "openvino": ("openvino-genai", "openvino_tokenizer.xml"),
}
_RUNTIMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}


def model_card(record: PackageRecord) -> str:
    """The card's text, front matter included."""
    return "\n".join([*_front(record), "", *_body(record)]).rstrip() + "\n"


def _front(record: PackageRecord) -> Iterator[str]:
    source, manifest = record.source, record.manifest
    bits = sorted({layer["bits"] for layer in manifest.layers.values()})
    tags = ["roundexport", manifest.target, *(["quantized"] if bits else []), *(f"int{count}" for count in bits)]
    yield "---"
    for key, value in (
        ("license", source.license),
        ("license_name", source.license_name),
        ("license_link", source.license_link),
        ("base_model", source.base_model),
        ("base_model_relation", source.relation),
    ):
        if value is not None:
            yield f"{key}: {_yaml(value)}"
    if source.languages:
        yield "language:"
        yield from (f"- {_yaml(code)}" for code in source.languages)
    yield f"library_name: {manifest.target}"
    yield f"pipeline_tag: {_TASKS[manifest.task]}"
    if bits:
        yield "quantized_by: roundexport"
    yield "tags:"
    yield from (f"- {_yaml(tag)}" for tag in dict.fromkeys(tags))
    yield "---"


def _body(record: PackageRecord) -> Iterator[str]:
    runtime = _RUNTIMES[record.manifest.target]
    yield f"# {_text(record.source.name)} for {runtime}"
    yield ""
    size = f"{mebibytes(record.size)} in all"
    bits = record.bits_per_weight
    dense = "" if bits is None else f", {short(bits)} bits per quantized weight"
    yield f"{summary(bits_of(record)) or 'Every weight float'}{dense}; {size}."
    yield ""
    yield from _use(record)
    yield from _lost(record)
    yield from _table("How it was made", [*story.made(record), *story.exported(record)])
    yield from _errors(record)
    yield from _speed(record)
    yield from _table("Environment", story.environment(record))
    yield from _unknown(record)


def _use(record: PackageRecord) -> Iterator[str]:
    extra, folder = record.manifest.target, "PACKAGE"
    yield "## Use"
    yield ""
    yield "```sh"
    yield f"pip install 'roundexport[{extra}]'"
    if record.manifest.task == "generate":
        yield f'roundexport generate {folder} --prompt "Once upon a time"'
    elif record.manifest.task == "classify_image":
        yield f"roundexport classify {folder} picture.jpg"
    elif record.manifest.task == "translate":
        yield f'roundexport generate {folder} --prompt "A text."'
    elif record.manifest.task in ("transcribe", "ctc"):
        yield f"roundexport transcribe {folder} speech.wav"
    elif record.manifest.task not in HEADLESS:
        yield f'roundexport classify {folder} "A text."'
    elif record.manifest.task == "embed_image":
        yield f'python -c \'from roundexport.runtime import load; print(load("{folder}").embed(["image.jpg"]).shape)\''
    else:
        yield f'python -c \'from roundexport.runtime import load; print(load("{folder}").embed(["a text"]).shape)\''
    yield "```"
    yield ""
    client, needs = _CLIENTS[extra]
    if record.manifest.task == "generate" and needs in record.manifest.files:
        library = f", once `{COMMAND} {folder}` has put the operator's library there"
        yield f"{client} opens the folder, too{library if record.manifest.settings.get(KERNELS) else ''}."
        yield ""


def _lost(record: PackageRecord) -> Iterator[str]:
    yield "## What was lost"
    yield ""
    if record.verification is None:
        yield "Not measured."
        yield ""
        return
    text = _text(accuracy.text_of(record.verification))
    yield f"Against the float model, on the package's own runtime, over held-out text ({text})."
    yield ""
    yield "| | | |"
    yield "|---|---|---|"
    for line in accuracy.lines(record.verification):
        yield f"| {_text(line.name)} | {_text(line.value)} | {_text(line.meaning)} |"
    yield ""
    for gate in accuracy.gates(record.verification):
        yield f"**Gate failed:** {_text(gate)}"
        yield ""


def _errors(record: PackageRecord) -> Iterator[str]:
    losses = losses_of(record)
    if not losses:
        return
    yield "## Error per layer"
    yield ""
    yield f"{story.measure_of(record).capitalize()}: median over blocks, rounded to nearest and as tuned."
    yield ""
    yield "| kind of layer | before | after | after / before |"
    yield "|---|---|---|---|"
    for row in losses_told(losses):
        yield "| " + " | ".join(map(_text, row)) + " |"
    yield ""


def _speed(record: PackageRecord) -> Iterator[str]:
    if not record.timings:
        return
    decoders = record.manifest.task == "generate"
    keys = ("ttft_ms", "decode_tps") if decoders else ("latency_ms", "texts_per_s")
    yield "## Speed"
    yield ""
    yield "; ".join(f"{what} {_text(value)}" for what, value in story.machine(record.timings[0])) + "."
    yield ""
    yield f"| engine | shape | {'first token, ms | tokens/s' if decoders else 'ms per call | texts/s'} |"
    yield "|---|---|---|---|"
    for timing in record.timings:
        figures = " | ".join(short(number(timing.row.get(key)), 3) for key in keys)
        yield f"| {_text(timing.engine)} | {_text(timing.told())} | {figures} |"
    yield ""


def _table(title: str, pairs: Pairs) -> Iterator[str]:
    yield f"## {title}"
    yield ""
    yield "| | |"
    yield "|---|---|"
    yield from (f"| {_text(what)} | {_text(value)} |" for what, value in pairs)
    yield ""


def _unknown(record: PackageRecord) -> Iterator[str]:
    source = record.source
    said = []
    if source.license is None:
        said.append("The source does not state its license; find it out before you pass this package on.")
    if source.base_model is None:
        said.append("The source does not name its model on the hub.")
    if said:
        yield "## Not known"
        yield ""
        yield from (f"- {sentence}" for sentence in said)
        yield ""


def _yaml(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _text(value: str) -> str:
    """Words of strangers in Markdown: no table cell is left, nothing is markup, no address becomes a link."""
    flat = " ".join(value.split())
    for mark in "\\`*_[]<>|#~":
        flat = flat.replace(mark, f"\\{mark}" if mark not in "<>" else {"<": "&lt;", ">": "&gt;"}[mark])
    return flat
