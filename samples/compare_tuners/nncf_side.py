"""NNCF's side of compare.py (see side.py): `nncf.compress_weights` on an OpenVINO graph of the model.

settings: mode, group_size, and its switches awq, scale_estimation, gptq; with any of these it gets the tokens too.
Embedding and lm_head stay float (backup mode NONE).  The dequantized weights are read off the compressed graph: what
constants feed each MatMul is computed in numpy, which takes the place of the runtime's decompression.  AWQ as NNCF
does it in a gated MLP moves scales from down_proj's columns into up_proj's rows before rounding, so the weights stand
for themselves; where it would put a multiplication on an activation, or where anything else changed, the logits of
the model with these weights differ from the graph's, and the side fails.
"""

from importlib.metadata import version

import nncf
import numpy as np
import openvino as ov
import torch
from side import Job, Stored, answer, block_linears
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-3  # of logits, float32 against float32; a wrong weight gives differences above 0.1
BITS = {"i8": 8, "u8": 8, "i4": 4, "u4": 4, "u3": 3, "i2": 2, "u2": 2, "f16": 16, "f32": 32, "bf16": 16}


class Logits(torch.nn.Module):
    """Token ids [1, S] to logits, with the causal mask spelled out so that nothing of it depends on the caller."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [1, S, V] of token ids [1, S]."""
        length = ids.shape[1]
        mask = torch.full((length, length), -1e30).triu(1)[None, None]
        places = torch.arange(length)[None]
        return self.model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits


def graph_of(model: torch.nn.Module, ids: torch.Tensor) -> ov.Model:
    """The model as an OpenVINO graph for samples of this length."""
    with torch.no_grad():
        return ov.convert_model(torch.export.export(Logits(model), (ids[:1],)))


def called_order(model: torch.nn.Module, ids: torch.Tensor) -> list[str]:
    """Names of all linears in the order in which they are called, which is how the graph numbers its MatMuls."""
    names: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: names.append(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(ids[:1, :8])
    for hook in hooks:
        hook.remove()
    return names


def weight_nodes(graph: ov.Model, names: list[str]) -> dict[str, ov.Node]:
    """Module name -> the node that gives its MatMul's weight; MatMuls are named linear, linear_1 and so on."""
    found = {}
    for node in graph.get_ops():
        stem = node.get_friendly_name().split("/")[0]
        if node.get_type_name() == "MatMul" and stem.startswith("linear"):
            number = int(stem.partition("_")[2] or 0)
            found[names[number]] = node.input_value(1).get_node()
    if len(found) != len(names):
        raise SystemExit(f"the graph has {len(found)} linear layers, the model {len(names)}")
    return found


def value_of(node: ov.Node) -> np.ndarray:
    """The float32 value of a chain of constants: what decompression gives, in OpenVINO's own arithmetic."""
    model = ov.Model([ov.opset13.convert(node, "f32")], [])
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    return ov.Core().compile_model(model, "CPU", options)([])[0].copy()


def stored(node: ov.Node, group_size: int) -> Stored:
    """What the constants of a compressed weight take: codes, and per group scale and zero point."""
    constants = []
    todo = [node]
    while todo:
        each = todo.pop()
        if each.get_type_name() == "Constant" and each.get_element_type().get_type_name() in BITS:
            constants.append((np.prod(each.shape), BITS[each.get_element_type().get_type_name()]))
        todo += [value.get_node() for value in each.input_values()]
    constants.sort(reverse=True)
    (count, bits), *others = constants
    groups = count // group_size
    return Stored(bits, group_size, round(sum(size * width for size, width in others) / groups))


def compress(graph: ov.Model, job: Job) -> ov.Model:
    """The graph with compressed weights."""
    settings = dict(job.settings)
    mode = nncf.CompressWeightsMode[settings.pop("mode")]
    group_size = settings.pop("group_size")
    if settings:
        settings["dataset"] = nncf.Dataset([row[None] for row in job.ids])
        settings["subset_size"] = len(job.ids)
    return nncf.compress_weights(
        graph, mode=mode, group_size=group_size, ratio=1.0, backup_mode=nncf.BackupMode.NONE, **settings
    )


def check(model: torch.nn.Module, graph: ov.Model, ids: torch.Tensor) -> None:
    """Refuse weights that do not give the graph's own logits."""
    run = ov.Core().compile_model(
        graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    )
    with torch.no_grad():
        off = np.abs(model(ids[:1]).logits.numpy() - run(ids[:1].numpy())[0]).max()
    if not off < TOLERANCE:
        raise SystemExit(f"the weights read off NNCF's graph give logits that are off by {off:.3g}")


if __name__ == "__main__":
    job = Job.from_arguments()
    ids = torch.from_numpy(job.ids)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    names = called_order(model, ids)
    graph = compress(graph_of(model, ids), job)
    nodes = weight_nodes(graph, names)
    linears = block_linears(model)
    weights = {name: torch.from_numpy(value_of(nodes[name])).reshape(linears[name].weight.shape) for name in linears}
    layers = {name: stored(nodes[name], job.settings["group_size"]) for name in linears}
    for name, weight in weights.items():
        linears[name].weight.data.copy_(weight)
    check(model, graph, ids)
    answer(job, version("nncf"), {f"{name}.weight": weight for name, weight in weights.items()}, layers)
