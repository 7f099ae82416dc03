"""What transformers' GGUF reader cannot do with a file, found in its header and refused by name.

The reader passes over what it does not know, and the model that results is another one.  So, before a weight is read:

    split files, adapters, unknown architectures and tensor types    refused
    metadata that the reader ignores (rope scaling, softcaps, …)     refused, unless it says what the config says anyway
    tensors that the reader would drop (rope_freqs, extra biases)    the file must hold as many weights as the model
    vocabularies whose splitting of text the reader guesses          refused

Source: modeling_gguf_pytorch_utils.py and integrations/{ggml.py,gguf/} of transformers 5.23; the splitting rules of
llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from roundexport.errors import CheckpointError, UnsupportedError

from .gguf_header import GgufHeader

ORIGINAL = "give the folder of the float model it was made from"
_TOKENIZERS = ("gpt2", "llama", "gemma4")
# Names of ``tokenizer.ggml.pre`` that split as GPT-2 does, which is what the reader does with every name it lacks, …
_AS_GPT2 = frozenset(
    "gpt-2 gpt2 phi-2 jina-es jina-de jina-v1-en jina-v2-es jina-v2-de roberta-bpe mpt olmo jais".split()
)
# … and those that take every digit by itself before that.
DIGIT_BY_DIGIT = frozenset("smollm starcoder refact command-r codeshell exaone minerva-7b".split())
_HARMLESS = frozenset(["vocab_size", "tensor_data_layout", "use_parallel_residual", "rope.scaling.finetuned"])
_READ_AS = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss", "minimax-m2": "minimax_m2"}


def check_kind(header: GgufHeader) -> None:
    """Refuse a file that is not a whole model of a known architecture with a tokenizer.

    Raises:
        UnsupportedError: naming what it is.
    """
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    path, metadata = header.path, header.metadata
    parts = metadata.get("split.count", 1)
    if parts > 1:
        raise UnsupportedError(
            f"{path} is one of {parts} parts; merge them first: llama-gguf-split --merge {path.name} merged.gguf"
        )
    if metadata.get("general.type", "model") != "model":
        raise UnsupportedError(f"{path} holds a GGUF {metadata['general.type']}, not a model")
    known = sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"})
    if _READ_AS.get(header.architecture, header.architecture) not in known:
        raise UnsupportedError(
            f"{path}: transformers' GGUF reader does not know the architecture {header.architecture!r}; it knows "
            f"{', '.join(known)}; {ORIGINAL}"
        )
    _check_tokenizer(header)


def _check_tokenizer(header: GgufHeader) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    kind = header.metadata.get("tokenizer.ggml.model")
    if kind not in _TOKENIZERS or not header.metadata.get("tokenizer.ggml.tokens"):
        found = "no tokenizer" if kind is None else f"a tokenizer of the kind {kind!r}"
        raise UnsupportedError(
            f"{header.path} holds {found}; kinds that are read: {', '.join(_TOKENIZERS)}; {ORIGINAL}"
        )
    if kind != "gpt2":
        return
    split = header.metadata.get("tokenizer.ggml.pre", "gpt-2" if header.architecture == "gpt2" else "default")
    if split not in {*_AS_GPT2, *DIGIT_BY_DIGIT, *GGUF_PRE_TOKENIZER_SPLITS}:
        raise UnsupportedError(
            f"{header.path}: its tokenizer splits text by the rule {split!r} (tokenizer.ggml.pre), which is not known "
            f"here, so other tokens would come out; {ORIGINAL}"
        )


def check_data(header: GgufHeader) -> None:
    """Refuse tensor types that are not dequantized, and a file that ends before its data do.

    Raises:
        UnsupportedError: a type.
        CheckpointError: the file is incomplete.
    """
    import gguf

    end = 0
    names = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    for tensor in header.tensors:
        try:
            kind = gguf.GGMLQuantizationType(tensor.kind)
            elements, size = gguf.GGML_QUANT_SIZES[kind]
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise UnsupportedError(
                f"{header.path}: {tensor.name} is of the type {names.get(tensor.kind, tensor.kind)}, which the gguf "
                f"package cannot dequantize; {ORIGINAL}"
            ) from error
        if not tensor.shape or tensor.shape[-1] % elements:
            raise CheckpointError(
                f"{header.path}: {tensor.name} {list(tensor.shape)} does not fill blocks of {elements}"
            )
        end = max(end, header.data + tensor.offset + prod(tensor.shape) // elements * size)
    found = header.path.stat().st_size
    if found < end:
        raise CheckpointError(
            f"{header.path} has {found} bytes, its tensors end at {end}; it is incomplete, fetch it again"
        )


def check_config(header: GgufHeader, config: Any) -> None:
    """Refuse what the file says of the model where the reader ignores it and its config says something else.

    Args:
        header: the file's header.
        config: the transformers config that the reader made of it.

    Raises:
        UnsupportedError: naming the key and both values.
    """
    from transformers.integrations import GGUF_CONFIG_MAPPING

    name = _READ_AS.get(header.architecture, header.architecture)
    read = {key for key, target in GGUF_CONFIG_MAPPING[name].items() if target is not None}
    said = _said(config)
    for key, value in header.metadata.items():
        setting = key.removeprefix(f"{header.architecture}.")
        if setting == key or setting in read or setting in _HARMLESS:
            continue
        expected = said.get(setting)
        if setting == "attention.sliding_window" and value >= said["rope.scaling.original_context_length"]:
            continue  # a window as long as the context is none
        if expected is None or not _same(value, expected):
            instead = "does not read" if expected is None else f"takes for {expected!r}"
            raise UnsupportedError(
                f"{header.path}: {key} is {value!r}, which transformers' GGUF reader {instead}, so another model would "
                f"come out; {ORIGINAL}"
            )


def _said(config: Any) -> dict[str, Any]:
    """What a config says, by the name of the GGUF setting that the reader may ignore."""
    rope = getattr(config, "rope_parameters", None) or {}
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    turned = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    return {
        "rope.dimension_count": int(width * (1.0 if turned is None else turned)),
        "rope.freq_base": rope.get("rope_theta", getattr(config, "rope_theta", None)),
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1.0,
        "rope.scaling.attn_factor": 1.0,
        "rope.scaling.original_context_length": getattr(config, "max_position_embeddings", 0),
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.causal": True,
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "expert_count": 0,
        "expert_used_count": 0,
    }


def _same(value: Any, expected: Any) -> bool:
    numbers = isinstance(value, int | float) and isinstance(expected, int | float)
    return abs(value - expected) <= 1e-6 * abs(expected) if numbers else bool(value == expected)


def check_elements(header: GgufHeader, model: Any) -> None:
    """Refuse a file that holds other numbers of weights than the model: tensors would be dropped, or stay random.

    Args:
        header: the file's header.
        model: the model that the reader's config makes, on the meta device.

    Raises:
        UnsupportedError: the numbers differ.
    """
    wanted = sum(parameter.numel() for parameter in model.parameters())  # tied ones are counted once
    found = sum(prod(tensor.shape) for tensor in header.tensors)
    if found != wanted:
        odd = [t.name for t in header.tensors if not t.name.startswith(("blk.", "token_embd.", "output"))]
        named = f", among them {', '.join(odd[:3])}" if odd else ""
        raise UnsupportedError(
            f"{header.path}: its {len(header.tensors)} tensors{named} hold {found:,} weights, the "
            f"{type(model).__name__} that transformers' GGUF reader makes of them has {wanted:,}; {ORIGINAL}"
        )
