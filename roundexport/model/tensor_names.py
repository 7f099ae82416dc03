"""Tensor names: from the way a checkpoint file spells them to the module paths of the loaded transformers model.

    base prefix     AutoModelForCausalLM has ``transformer.h.0…`` where the file of a base model has ``h.0…``; AutoModel
                    the other way round, and then without heads.  The prefix is known per model type (below)
    experts         see expert_names.py
    legacy names    ``LayerNorm.gamma/beta`` -> ``weight/bias``, ``embed_out`` -> ``lm_head``; and what torch calls the
                    two parts of a weight norm now

Names alone decide; no model is built.  What a tied lm_head stands for is settled in tied_head.py.
Held against transformers itself, family by family, in tests/model/test_checkpoint.py.
Source: ``base_model_prefix`` and ``_tied_weights_keys`` of transformers 5.23's classes, and its
conversion_mapping.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from roundexport.errors import CheckpointError
from roundexport.types import HEADLESS, PAIRS, Task

from .expert_names import modern_name
from .packed_names import renamed

HEAD = "lm_head.weight"
_TABLES = "lm_head", "proj_out", "transformer.wte", "transformer.wpe", "wte", "wpe", "shared."


def is_table(name: str) -> bool:
    """Whether a matrix is looked up by token or position, or is the lm_head that may share it, by its name."""
    return "embed" in name or name.removeprefix("model.").startswith(_TABLES)


_HEADS = ("lm_head.", "cls.", "score.", "classifier.", "qa_outputs.")
_PROJECTION = ("visual_projection.", "model.connector.", "model.multi_modal_projector.", "model.visual.")
# Where there is one of these the base is inside its class.
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "tokens_embed", "embeddings")
_LEGACY = (
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
    (re.compile(r"^embed_out\."), "lm_head."),
    (re.compile(r"\.conv\.weight_g$"), ".conv.parametrizations.weight.original0"),  # weight norm of older torch
    (re.compile(r"\.conv\.weight_v$"), ".conv.parametrizations.weight.original1"),
)
OWN_HEADS = frozenset(
    """
    bert bert-generation big_bird biogpt camembert data2vec-text electra ernie megatron-bert rembert roberta
    roberta-prelayernorm roformer xlm-roberta xlm-roberta-xl xmod
    """.split()
)
"""Types whose decoders call their head something else than lm_head; the class says what it shares."""
# Where it is neither "model" nor the model type itself.
_PREFIXES = {
    **dict.fromkeys(
        "bloom codegen ctrl dbrx falcon flaubert gpt-sw3 gpt2 gpt_bigcode gpt_neo gptj".split(), "transformer"
    ),
    **dict.fromkeys("mamba mamba2 falcon_mamba xlstm".split(), "backbone"),
    **dict.fromkeys("mpt openai-gpt squeezebert xlm xlnet".split(), "transformer"),
    **dict.fromkeys("camembert xlm-roberta xlm-roberta-xl xmod jina_embeddings_v3".split(), "roberta"),
    **dict.fromkeys("big_bird megatron-bert bert-generation".split(), "bert"),
    **dict.fromkeys("siglip siglip_vision_model clip clip_vision_model".split(), "vision_model"),
    "deberta-v2": "deberta", "gpt_neox": "gpt_neox", "gpt_neox_japanese": "gpt_neox_japanese", "biogpt": "biogpt",
}  # fmt: skip


def canonical_names(stored: Iterable[str], model_type: str, task: Task) -> dict[str, str]:
    """Map the loaded model's tensor names to those of the file.

    Args:
        stored: names in the checkpoint's files.
        model_type: ``model_type`` of the config.
        task: one without a head for the base model, any other for a class with one.

    Returns:
        Name in the model -> name in the file.  Heads that the base model lacks are left out.

    Raises:
        CheckpointError: two names in the file mean the same tensor.
    """
    modern = {name: modern_name(renamed(_modern(name), model_type), model_type) for name in stored}
    prefix = base_prefix(modern.values(), model_type)
    has_prefix = any(name.startswith(prefix) for name in modern.values())
    found: dict[str, str] = {}
    bare = task in HEADLESS and not any(name.startswith(_PROJECTION) for name in modern.values())
    for name, spelled in modern.items():
        # Classes with an encoder and a decoder have no other form in files.
        canonical = spelled if task in PAIRS else _place(spelled, prefix, has_prefix, bare)
        if canonical is None:
            continue
        if canonical in found:
            raise CheckpointError(f"the weights hold {canonical} twice, as {found[canonical]} and as {name}")
        found[canonical] = name
    return found


def _modern(name: str) -> str:
    for pattern, replacement in _LEGACY:
        name = pattern.sub(replacement, name)
    return name


def base_prefix(names: Iterable[str], model_type: str) -> str:
    """Prefix of the base model's tensors inside a class with a head, with its dot."""
    own = _PREFIXES.get(model_type, model_type.replace("-", "_")) + "."
    return own if model_type in _PREFIXES or any(name.startswith(own) for name in names) else "model."


def _place(name: str, prefix: str, has_prefix: bool, bare: bool) -> str | None:
    if not bare:
        return name if has_prefix or name.startswith(_HEADS) else prefix + name
    if not has_prefix:
        return name
    return name.removeprefix(prefix) if name.startswith(prefix) else None


def embeddings(names: Iterable[str]) -> list[str]:
    """Token embeddings, the outermost first."""
    tables = [name for name in names if name.endswith(".weight") and name.split(".")[-2] in _EMBEDDINGS]
    return sorted(tables, key=lambda name: (name.count("."), name))


def is_pooler(name: str) -> bool:
    """Whether a module or parameter belongs to a pooler, whose output only heads that classify texts use."""
    return "pooler" in name


def is_for_training(name: str) -> bool:
    """Whether a parameter stands for masked frames of a sound, which nobody masks but for training."""
    return name.rpartition(".")[2] == "masked_spec_embed"
