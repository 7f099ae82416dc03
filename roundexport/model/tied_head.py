"""Which weight lm_head has: the embedding's, or one of its own.  One rule for tune, export, verify and reference.

    `tie_word_embeddings`   lm_head.weight in the file          lm_head is
    true                    none, or bit-identical to           the embedding; stored once
                            the embedding
    true                    other numbers                       the file's own, untied
    false                   there                               the file's own, untied
    false                   none                                refused: the head is lost

Where config.json does not name the flag, the model class's own default counts.  That is what transformers' own
`from_pretrained` does: it ties two tensors that are both in the file only where their values are equal.
Source: `PreTrainedModel.tie_weights` of transformers 5.23 and 5.24; held against it in tests/model/test_tied_head.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import CheckpointError

from .tensor_names import HEAD, base_prefix, embeddings

_PART = 1 << 22  # values compared at a time
# Types of causal language models whose class has `tie_word_embeddings` false; all others have it true.
_UNTIED_BY_DEFAULT = frozenset(
    """
    afmoe apertus apertus1p5_text arcee aria_text axk1 axk2 bailing_hybrid bamba beam bitnet blt codegen cwm dbrx
    deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dory dots1 dots3_note dots3_note_text emu3 exaone
    exaone4 exaone_moe falcon_h1 flex_olmo flint fuyu git glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt_neox gpt_oss
    gptj granite granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense
    hunyuan_v1_moe hy_v3 hy_v4 hyperclovax internlm3 iquestcoder jais2 jamba kimi_linear kolibri1 laguna llama llama4
    llama4_text longcat_flash mamba2 mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text ministral ministral3
    mistral mixtral moshi nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe persimmon phi phi3
    phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
    qwen4_exp qwen4_exp_text reformer rembert rwkv sarvam_mla sarvam_moe seed_oss solar_open stablelm xlstm
    """.split()
)


class OpenModel(Protocol):
    """What the rule asks of a checkpoint."""

    config: dict[str, Any]
    location: str

    @property
    def model_type(self) -> str: ...  # noqa: D102

    def shape(self, name: str) -> tuple[int, ...]: ...  # noqa: D102

    def float32(self, name: str, rows: tuple[int, int] | None = None) -> NDArray[np.float32]: ...  # noqa: D102


def wants_tied(config: Mapping[str, Any]) -> bool:
    """Whether config.json, or the class where it is silent, says that lm_head is the embedding.

    Raises:
        CheckpointError: a nested ``text_config`` says otherwise.
    """
    flag = config.get("tie_word_embeddings")
    nested = config.get("text_config")
    inner = nested.get("tie_word_embeddings") if isinstance(nested, dict) else None
    if flag is not None and inner is not None and bool(flag) != bool(inner):
        raise CheckpointError(
            f"config.json says tie_word_embeddings {flag} and, inside text_config, {inner}; make both the same"
        )
    said = inner if flag is None else flag
    return config.get("model_type") not in _UNTIED_BY_DEFAULT if said is None else bool(said)


def settle_head(checkpoint: OpenModel, names: dict[str, str]) -> bool:
    """Give lm_head the tensor it has by the rule above.

    Args:
        checkpoint: a causal language model, whose tensors can be read already.
        names: name in the model -> name in the file; the head's entry is set.

    Returns:
        Whether the head is the embedding.

    Raises:
        CheckpointError: the head is neither in the file nor tied.
    """
    wanted = wants_tied(checkpoint.config)
    tables = embeddings(names)
    if HEAD not in names:
        if wanted and tables:
            names[HEAD] = names[tables[0]]
            return True
        prefix = base_prefix(names, checkpoint.model_type)
        if all(name.startswith(prefix) for name in names):
            said = "says" if "tie_word_embeddings" in checkpoint.config else "by its model's default means"
            raise CheckpointError(
                f"{checkpoint.location}: the weights lack {HEAD}, and config.json {said} tie_word_embeddings "
                f"{str(wanted).lower()}; fetch the model again, or set it to true if the embedding is the head"
            )
        return False
    if not (wanted and tables and equal(checkpoint, HEAD, tables[0])):
        return False
    del names[HEAD]  # put back behind the embedding, which then counts as the weight's owner
    names[HEAD] = names[tables[0]]
    return True


def equal(checkpoint: OpenModel, one: str, other: str) -> bool:
    """Whether two tensors hold the same numbers; reading ends at the first part that differs."""
    shape = checkpoint.shape(one)
    if shape != checkpoint.shape(other) or len(shape) != 2:
        return False
    step = max(1, _PART // max(1, shape[1]))
    for start in range(0, shape[0], step):
        rows = (start, min(start + step, shape[0]))
        if not np.array_equal(checkpoint.float32(one, rows), checkpoint.float32(other, rows)):
            return False
    return True
