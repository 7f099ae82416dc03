"""llama.cpp's side of compare.py (see side.py): its own types, with an importance matrix from the tokens.

settings: type, as in Q4_K_M.  The float model is written as a GGUF file of the Llama architecture (query and key rows
in llama.cpp's rotary order), quantized by `llama_model_quantize`, and its blocks are read back with the gguf package.
The importance matrix is what `llama-imatrix` gathers: the mean square of every input over all tokens.  Embeddings and
lm_head stay float32.  A type is a mixture: where K is not a multiple of 256, and in layers that it holds dear,
llama.cpp takes other formats than the name says; real bits are counted format by format.
"""

import ctypes
from importlib.metadata import version
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from side import Job, Stored, answer, block_linears
from transformers import AutoModelForCausalLM

FORMATS = {  # bits of a code, weights that share a scale, and what else is stored per such group, in bits
    "Q2_K": Stored(2, 16, 10), "Q3_K": Stored(3, 16, 7), "Q4_K": Stored(4, 32, 16), "Q5_K": Stored(5, 32, 16),
    "Q6_K": Stored(6, 16, 9), "Q4_0": Stored(4, 32, 16), "Q4_1": Stored(4, 32, 32), "Q5_0": Stored(5, 32, 16),
    "Q5_1": Stored(5, 32, 32), "Q8_0": Stored(8, 32, 16), "IQ4_NL": Stored(4, 32, 16),
}  # fmt: skip


def rotary(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection from transformers' order (halves) to llama.cpp's (pairs)."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """The way back."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def heads_of(config: object, name: str) -> int | None:
    """Heads whose rows are reordered, of a query or key projection."""
    kinds = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    kind = kinds.get(name.removesuffix(".weight").rpartition(".")[2])
    return None if kind is None else getattr(config, kind)


def tensor_names(blocks: int) -> gguf.TensorNameMap:
    """What modules of transformers are called in a GGUF file."""
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, blocks)


def write_float(model: torch.nn.Module, path: Path) -> dict[str, str]:
    """The model as a float32 GGUF file; returns its tensors' names by parameter name."""
    config = model.config
    if config.model_type != "llama":
        raise SystemExit(f"{config.model_type} is not written as GGUF here; llama is")
    names = tensor_names(config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    found = {}
    for name, parameter in model.named_parameters():
        stem, _, kind = name.rpartition(".")
        found[name] = f"{names.get_name(stem)}.{kind}"
        heads = heads_of(config, name)
        values = parameter.detach().float().numpy()
        writer.add_tensor(found[name], values if heads is None else rotary(values, heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def importance(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, np.ndarray]:
    """Mean square of the inputs of every linear in the blocks, by module name."""
    linears = block_linears(model)
    sums = {name: torch.zeros(linear.in_features, dtype=torch.float64) for name, linear in linears.items()}

    def see(name: str, x: torch.Tensor) -> None:
        sums[name] += x.flatten(0, -2).square().sum(0)

    hooks = [
        linear.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        for sample in ids.split(4):
            model.model(input_ids=sample)
    for hook in hooks:
        hook.remove()
    return {name: (total / ids.numel()).float().numpy() for name, total in sums.items()}


def quantize(source: Path, out: Path, kind: str, matrix: dict[str, np.ndarray], tables_float: bool = True) -> None:
    """`llama-quantize --allow-requantize` with an importance matrix, by tensor name.

    Args:
        source: a GGUF file of any type.
        out: file to make.
        kind: as in Q4_K_M.
        matrix: mean squares of inputs.
        tables_float: embeddings and lm_head in float32, or as llama.cpp has them.
    """
    rows = [
        llama_cpp.llama_cpp.llama_model_imatrix_data(
            name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), len(values)
        )
        for name, values in matrix.items()
    ]
    rows.append(llama_cpp.llama_cpp.llama_model_imatrix_data(None, None, 0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = torch.get_num_threads()
    params.allow_requantize = True
    if tables_float:
        params.output_tensor_type = params.token_embedding_type = gguf.GGMLQuantizationType.F32
    params.imatrix = (llama_cpp.llama_cpp.llama_model_imatrix_data * len(rows))(*rows)
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not quantize to {kind}")


if __name__ == "__main__":
    job = Job.from_arguments()
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    job.out.mkdir(parents=True, exist_ok=True)
    source, made = job.out / "float.gguf", job.out / "quantized.gguf"
    names = write_float(model, source)
    matrix = importance(model, torch.from_numpy(job.ids))
    quantize(source, made, job.settings["type"], {names[f"{name}.weight"]: row for name, row in matrix.items()})
    source.unlink()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(made).tensors}
    weights, how = {}, {}
    for name in matrix:
        tensor = tensors[names[f"{name}.weight"]]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        heads = heads_of(model.config, name)
        weights[f"{name}.weight"] = torch.from_numpy(values if heads is None else halves(values, heads).copy())
        how[name] = FORMATS[tensor.tensor_type.name]
    answer(job, version("llama-cpp-python"), weights, how)
