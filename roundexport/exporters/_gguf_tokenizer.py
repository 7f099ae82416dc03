"""Tokenizer and chat template of a Hugging Face folder in a GGUF file: byte-level BPE whose splitting llama.cpp knows.

    tokenizer.ggml.model gpt2, tokens, token_type, merges, special tokens, tokenizer.chat_template
    tokenizer.ggml.pre     the rule by which text is split before merges, told by the pre_tokenizer of tokenizer.json

llama.cpp tells the rule by hashing tokens of a text; here it is read from the file, and one that is not known is
refused: a wrong one gives other tokens without a word.
Source: get_vocab_base of llama.cpp's conversion/base.py, llm_tokenizer_bpe in src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roundexport.errors import UnsupportedError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_RULES = {_CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe", _CONTRACTIONS + r"\p{N}" + _REST: "qwen2"}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def splitting(folder: Path) -> str:
    """llama.cpp's name for the rule by which a folder's tokenizer splits text.

    Raises:
        UnsupportedError: there is no tokenizer.json, or it is of another kind or rule.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UnsupportedError(f"{folder} has no tokenizer.json, of which a GGUF file's tokenizer is made")
    document = json.loads(path.read_text(encoding="utf-8"))
    rule = document.get("pre_tokenizer") or {}
    steps = rule.get("pretokenizers", [rule])
    kinds = [step.get("type") for step in steps]
    found = None
    if document["model"].get("type") == "BPE" and kinds and kinds[-1] == "ByteLevel":
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            found = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            found = "smollm"
        elif kinds == ["Split", "ByteLevel"]:
            found = _RULES.get(steps[0].get("pattern", {}).get("Regex", ""))
    if found is None or any(step.get("add_prefix_space") for step in steps):
        raise UnsupportedError(
            f"{path}: how it splits text ({document['model'].get('type')}, {' and '.join(map(str, kinds))}) has no "
            "name in llama.cpp that is known here, so other tokens would come out; GPT-2's, SmolLM's, Llama 3's and "
            "Qwen 2's are written. Make the float file with llama.cpp's convert_hf_to_gguf.py, or export to another "
            "format"
        )
    return found


def write_tokenizer(writer: Any, folder: Path, config: Mapping[str, Any]) -> None:
    """Put a folder's tokenizer into a gguf.GGUFWriter.

    Args:
        writer: the writer.
        folder: has tokenizer.json.
        config: config.json, whose vocabulary may be larger than the tokenizer's.
    """
    import gguf
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = {number: text for text, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    added = tokenizer.get_added_tokens_decoder()
    tokens, types = [], []
    for number in range(config["vocab_size"]):
        tokens.append(texts.get(number, f"[PAD{number}]"))
        if number in added:
            types.append(_CONTROL if added[number].special else _USER_DEFINED)
        else:
            types.append(_NORMAL if number in texts else _UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting(folder))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=len(tokens)).add_to_gguf(writer)
