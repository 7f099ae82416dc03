"""Graphs of other people's exporters, and an artifact's integers put into them.

    python samples/foreign_graphs.py make EXPORTER MODEL OUT      in an environment that has the exporter
    python samples/foreign_graphs.py try MODEL OUT GRAPH…         in roundexport's: tune by rtn, rewrite every graph

`bash samples/foreign_graphs.sh MODEL OUT` makes the environments and does both; its last lines are a table.  Exporters
are torch.onnx.export (both of its ways), openvino.convert_model, transformers.exporters, optimum-onnx, optimum-intel.
The two of optimum need a transformers older than roundexport's, which is why making and rewriting are apart.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(verb: str, *args: str) -> int:
    if verb == "make":
        exporter, model, out = args
        Path(out).mkdir(parents=True)
        EXPORTERS[exporter](Path(model), Path(out))
        return 0
    model, out, *graphs = args
    return try_all(Path(model), Path(out), [Path(graph) for graph in graphs])


def try_all(model: Path, out: Path, graphs: list[Path]) -> int:
    """Tune once, rewrite every graph, and print a line for each."""
    import roundexport
    from roundexport.errors import RoundexportError

    artifact = out / "artifact"
    if not artifact.exists():
        settings = roundexport.TuneSettings(recipe="rtn", group_size=32)
        roundexport.tune(model, artifact, settings, progress=False)
    failed = 0
    print(f"{'graph':42s} {'layers':>6s} {'readers':>7s} {'packed':>6s} {'MiB':>16s} {'difference':>10s}")
    for graph in graphs:
        for dialect in ("onnxruntime", "standard") if graph.suffix == ".onnx" else ("onnxruntime",):
            name = f"{graph.parent.name}/{graph.name}" + (" standard" if dialect == "standard" else "")
            target = out / f"{graph.parent.name}-{graph.stem}-{dialect}"
            try:
                done = roundexport.rewrite(graph, artifact, target, model=model, dialect=dialect, progress=False)
            except RoundexportError as error:
                failed += 1
                print(f"{name:42s} refused: {error}")
                continue
            packed = sum(len(layers) > 1 for _, _, layers in done.places)
            sizes = f"{done.bytes_before / 2**20:.2f} -> {done.bytes_after / 2**20:.2f}"
            print(
                f"{name:42s} {len(done.layers):6d} {len(done.places):7d} {packed:6d} {sizes:>16s} "
                f"{done.outputs.difference:10.1e}"
            )
    return failed


def load(folder: Path) -> Any:
    """The float model, in eval mode, without a cache."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.config.use_cache = False
    return model.eval()


def logits_only(folder: Path) -> Any:
    """A module of ids and mask that gives logits."""
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = load(folder)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    return Logits().eval()


def example() -> tuple[Any, Any]:
    import torch

    return torch.randint(4, 200, (2, 8)), torch.ones(2, 8, dtype=torch.long)


def torch_dynamo(model: Path, out: Path) -> None:
    import torch

    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        logits_only(model), example(), str(out / "model.onnx"), dynamo=True, opset_version=21,
        input_names=["input_ids", "attention_mask"], output_names=["logits"],
        dynamic_shapes=({**free}, {**free}), external_data=True,
    )  # fmt: skip


def torch_legacy(model: Path, out: Path) -> None:
    import torch

    axes = {0: "batch", 1: "sequence"}
    torch.onnx.export(
        logits_only(model), example(), str(out / "model.onnx"), dynamo=False, opset_version=17,
        input_names=["input_ids", "attention_mask"], output_names=["logits"],
        dynamic_axes={name: axes for name in ("input_ids", "attention_mask", "logits")},
    )  # fmt: skip


def openvino_plain(model: Path, out: Path) -> None:
    import openvino as ov

    ids, mask = example()
    converted = ov.convert_model(logits_only(model), example_input={"input_ids": ids, "attention_mask": mask})
    ov.save_model(converted, out / "openvino_model.xml")  # rounds to float16, as everybody's do


def transformers_onnx(model: Path, out: Path) -> None:
    from transformers.exporters import OnnxConfig, OnnxExporter

    ids, mask = example()
    exporter = OnnxExporter()
    done = exporter.export(
        load(model), {"input_ids": ids, "attention_mask": mask}, config=OnnxConfig(dynamic=True, opset_version=21)
    )
    done.save_pretrained(out)


def transformers_onnx_decode(model: Path, out: Path) -> None:
    from transformers.exporters import OnnxConfig, OnnxExporter

    loaded = load(model)
    loaded.config.use_cache = True
    ids, mask = example()
    done = OnnxExporter().export_for_generation(
        loaded, {"input_ids": ids, "attention_mask": mask}, OnnxConfig(dynamic=True, ort_fusions="cpu"),
        multi_token_decode=True,
    )  # fmt: skip
    done.save_pretrained(out)


def transformers_openvino(model: Path, out: Path) -> None:
    from transformers.exporters import OpenVINOConfig, OpenVINOExporter

    loaded = load(model)
    loaded.config.use_cache = True
    ids, mask = example()
    done = OpenVINOExporter().export_for_generation(
        loaded, {"input_ids": ids, "attention_mask": mask}, OpenVINOConfig(dynamic=True, stateful=True),
        multi_token_decode=True,
    )  # fmt: skip
    done.save_pretrained(out)


def optimum_onnx(model: Path, out: Path) -> None:
    from optimum.exporters.onnx import main_export

    main_export(str(model), str(out), task="text-generation-with-past", do_validation=False)


def optimum_intel(model: Path, out: Path) -> None:
    from optimum.intel import OVModelForCausalLM

    OVModelForCausalLM.from_pretrained(str(model), export=True, load_in_8bit=False, compile=False).save_pretrained(out)


EXPORTERS: dict[str, Callable[[Path, Path], None]] = {
    "torch-dynamo": torch_dynamo,
    "torch-legacy": torch_legacy,
    "openvino": openvino_plain,
    "transformers-onnx": transformers_onnx,
    "transformers-onnx-decode": transformers_onnx_decode,
    "transformers-openvino": transformers_openvino,
    "optimum-onnx": optimum_onnx,
    "optimum-intel": optimum_intel,
}

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
