"""What the precisions cost that a runtime chooses by itself: KL of a package with one of them changed at a time.

    python samples/kl_of_precisions.py MODEL PACKAGE… [--samples 16] [--length 512] [--text FILE] [--only "as shipped"]

    as shipped            what `load` opens: the plugin's own choice on this machine, or accuracy_level as exported
    float32               `verify --precise`: activations, products and cache in float32
    float32 but …         the same with one precision that the runtime would like to use
    as shipped but …      the other way round

OpenVINO's are properties of its plugin (`verify --property NAME=VALUE`): the KV cache in 8 bits, inference in bfloat16,
activations in int8 by groups (DYNAMIC_QUANTIZATION_GROUP_SIZE; 0 leaves them alone).  ONNX Runtime has one,
accuracy_level in the graph, which `--precise` sets to 0.  The float model's answers are remembered, so that a row costs
what the package's run costs.  "Of the first's": the KL over that of the first package of the same target in the same
precision, paired by window.  The last columns are what the plugin says is in effect.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from roundexport import verify
from roundexport.formats.package import read_package
from roundexport.runtime.machine import machine_info
from roundexport.verification.report import DecoderQuality, Figure

CHANGES = {
    "KV cache in 8 bits": {"KV_CACHE_PRECISION": "u8"},
    "bfloat16, its cache too": {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"},  # it takes no other
    "int8 activations, groups of 32": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"},
    "int8 activations, groups of 128": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"},
    "int8 activations, whole rows": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "18446744073709551615"},
}
BACK = {
    "KV cache in bfloat16": {"KV_CACHE_PRECISION": "bf16"},  # where inference is; it takes no wider one then
    "float32 inference": {"INFERENCE_PRECISION_HINT": "f32"},
    "float32 activations": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"},
}


def settings(target: str) -> Iterator[tuple[str, bool, dict[str, str]]]:
    """Name, precise and properties of every row."""
    yield "as shipped", False, {}
    if target == "openvino":
        yield from ((f"as shipped but {name}", False, properties) for name, properties in BACK.items())
    yield "float32", True, {}
    if target == "openvino":
        yield from ((f"float32 but {name}", True, properties) for name, properties in CHANGES.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("packages", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--only", action="append", help="a precision's name; may be given more than once")
    given = parser.parse_args()
    print(
        "| package | precision | KL, nats | of the first's | top-1 | perplexity | "
        "activations, KV cache, group of int8 activations |"
    )
    print("|---|---|--:|--:|--:|--:|---|", flush=True)
    first: dict[tuple[str, str], DecoderQuality] = {}
    for package in given.packages:
        target = read_package(package, check_hashes=False).target
        for name, precise, properties in settings(target):
            if given.only and name not in given.only:
                continue
            report = verify(
                package, against=given.model, text=given.text, num_samples=given.samples, sample_len=given.length,
                precise=precise, properties=properties, progress=False,
            )  # fmt: skip
            found = report.quality
            assert isinstance(found, DecoderQuality), "decoders have a KL per token"
            effective = ", ".join(str(value) for value in report.engine["precision"].values())
            share = Figure.ratio(found.kl_windows, first.setdefault((target, name), found).kl_windows)
            shared, top1 = f"{share.mean:.3f} ± {share.stderr:.3f}", f"{found.top1.mean:.4f}"
            cells = (package.name, name, found.kl, shared, top1, f"{found.perplexity:.3f}", effective)
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    info = machine_info()
    print(json.dumps({key: info[key] for key in ("cpu", "instruction_sets", "versions")}))


if __name__ == "__main__":
    main()
