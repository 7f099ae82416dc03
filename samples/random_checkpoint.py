"""A checkpoint of a real shape with random weights, written one block at a time.

    python samples/random_checkpoint.py big --shape 30b-a3b --blocks 5        1.2 GB a block, 1.2 GB of tables
    roundexport tune big artifact --algorithm rtn --bits 4 --group-size 128
    python samples/export_cost.py artifact package onnx --max-ram 4           time and peak memory of the export
    python samples/random_checkpoint.py eyes --shape smolvlm-256m             one that reads pictures: picture_shapes.py

Numbers are drawn once, and every tensor begins at another place among them: as good for memory, and fast. Memory does
not depend on what the weights are, so a shape stands for the model that has it; fewer blocks than it has stand for
all of them as far as memory per block goes. What grows with the number of blocks is seen by two runs with different
ones. No file may lend its tensors to several blocks: names are in safetensors' header, and readers refuse headers
whose tensors overlap. Tokenizer and special tokens are the sample model's, or of a folder or GGUF file that is named.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picture_shapes import SHAPES as PICTURE_SHAPES
from picture_shapes import tensor_groups, write_side_files

if TYPE_CHECKING:
    import torch

SAMPLES = Path(__file__).resolve().parent
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_DENSE = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "0.6b": {**_DENSE, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "blocks": 28},
    "1b": {**_DENSE, "hidden_size": 1536, "intermediate_size": 4608, "num_attention_heads": 16, "blocks": 28},
    "4b": {**_DENSE, "hidden_size": 2560, "intermediate_size": 9728, "blocks": 36},
    "8b": {**_DENSE, "hidden_size": 4096, "intermediate_size": 12288, "blocks": 36},
    "30b-a3b": {
        **_DENSE,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "blocks": 48,
    },
    "small-moe": {
        **_DENSE,
        "hidden_size": 256,
        "intermediate_size": 512,
        "head_dim": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "blocks": 2,
    },
}
"""Qwen3 and Qwen3-MoE by the sizes in their config.json, and two that have none: 1b, between 0.6B and 1.7B (28 blocks
of 30.7 million weights, and a table of 233 million), and small-moe to try things with."""
VOCABULARY = 151936
_DRAWN = (1 << 22) - 3


def make_checkpoint(
    folder: Path, shape: str, blocks: int | None = None, vocabulary: int = VOCABULARY, tokenizer: Path | None = None
) -> Path:
    """Write a checkpoint in bfloat16.

    Args:
        folder: to make.
        shape: one of SHAPES or of PICTURE_SHAPES.
        blocks: fewer than the shape has; None: all.
        vocabulary: rows of the tables; lm_head is the embedding where they are fewer than the shape's.  Models that
            read pictures have the shape's.
        tokenizer: a model's folder or GGUF file; None: the sample model's.
    """
    folder.mkdir(parents=True)
    _copy_tokenizer(tokenizer, folder)
    if shape in PICTURE_SHAPES:
        write_side_files(folder, PICTURE_SHAPES[shape], blocks)
        _write_tensors(folder, tensor_groups(folder))
    else:
        _write_tensors(folder, _write_config(folder, shape, blocks, vocabulary))
    return folder


def _copy_tokenizer(model: Path | None, folder: Path) -> None:
    from roundexport.model.checkpoint import Checkpoint

    found = SAMPLES / "model" if model is None else Checkpoint.open(model).folder
    for name in TOKENIZER:
        shutil.copyfile(found / name, folder / name)


def _write_config(
    folder: Path, shape: str, blocks: int | None, vocabulary: int
) -> Iterator[dict[str, tuple[int, ...]]]:
    """Write config.json; gives shapes by name, a file's worth each."""
    sizes = dict(SHAPES[shape])
    count = sizes.pop("blocks") if blocks is None else blocks
    sizes.pop("blocks", None)
    mixture, tied = "num_experts" in sizes, vocabulary < VOCABULARY
    kind = "qwen3_moe" if mixture else "qwen3"
    sample = json.loads((SAMPLES / "model" / "config.json").read_text())
    config = {
        **sizes,
        **{name: sample[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "architectures": ["Qwen3MoeForCausalLM" if mixture else "Qwen3ForCausalLM"],
        "model_type": kind,
        "num_hidden_layers": count,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "norm_topk_prob": True,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tables = {
        "model.embed_tokens.weight": (vocabulary, sizes["hidden_size"]),
        "model.norm.weight": (sizes["hidden_size"],),
    }
    if not tied:
        tables["lm_head.weight"] = (vocabulary, sizes["hidden_size"])
    return iter([tables, *(dict(_block(sizes, block)) for block in range(count))])


def _write_tensors(folder: Path, groups: Iterable[dict[str, tuple[int, ...]]]) -> None:
    """One file per group, and their index."""
    import torch
    from safetensors.torch import save_file

    drawn = torch.randn(_DRAWN, generator=torch.Generator().manual_seed(0))
    places = {}
    for number, shapes in enumerate(groups):
        file = f"model-{number:05}.safetensors"
        tensors = {
            name: torch.full(size, float(not name.endswith("bias")), dtype=torch.bfloat16)
            if len(size) == 1
            else _values(drawn, size, number + 31 * place)
            for place, (name, size) in enumerate(shapes.items())
        }
        save_file(tensors, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(tensors, file))
        del tensors  # before the next block's are made
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _values(drawn: torch.Tensor, size: tuple[int, ...], place: int) -> torch.Tensor:
    """A tensor [N, …K] with a standard deviation of 1 / sqrt(K), from numbers that are drawn already."""
    import torch

    begin, wanted = place * 7919 % _DRAWN, math.prod(size)
    pool = torch.roll(drawn, -begin).mul_((wanted / size[0]) ** -0.5).bfloat16()
    return pool.repeat(-(-wanted // _DRAWN))[:wanted].reshape(size).clone()


def _block(sizes: dict[str, Any], number: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a block's tensors."""
    hidden, width, prefix = sizes["hidden_size"], sizes["head_dim"], f"model.layers.{number}"
    queries, keys = sizes["num_attention_heads"] * width, sizes["num_key_value_heads"] * width
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield f"{prefix}.self_attn.{name}.weight", (rows, hidden)
    yield f"{prefix}.self_attn.o_proj.weight", (hidden, queries)
    for name, size in (("self_attn.q_norm", width), ("self_attn.k_norm", width)):
        yield f"{prefix}.{name}.weight", (size,)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{name}.weight", (hidden,)
    experts, inner = [f"{prefix}.mlp"], sizes["intermediate_size"]
    if "num_experts" in sizes:
        yield f"{prefix}.mlp.gate.weight", (sizes["num_experts"], hidden)
        experts = [f"{prefix}.mlp.experts.{expert}" for expert in range(sizes["num_experts"])]
        inner = sizes["moe_intermediate_size"]
    for expert in experts:
        for name in ("gate_proj", "up_proj"):
            yield f"{expert}.{name}.weight", (inner, hidden)
        yield f"{expert}.down_proj.weight", (hidden, inner)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=[*SHAPES, *PICTURE_SHAPES], required=True)
    parser.add_argument("--blocks", type=int, help="fewer blocks than the shape has")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--tokenizer", type=Path, help="a model's folder or GGUF file that has it")
    options = parser.parse_args()
    make_checkpoint(options.folder, options.shape, options.blocks, options.vocabulary, options.tokenizer)


if __name__ == "__main__":
    main()
