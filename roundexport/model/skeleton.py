"""A transformers model without its weights, built from its config.

Linears and embeddings are on the meta device (shape, no values), experts as linears of their own among them, so a
skeleton of any size costs next to nothing; buffers such as rotary frequencies are computed by their own modules while
they are built, so they are real and right.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.initialization import no_init_weights

from roundexport.errors import UnsupportedError
from roundexport.types import PAIRS, input_of

from ._patches import weights_on_meta
from .checkpoint import Checkpoint
from .experts import split_experts
from .main_input import main_input
from .mixtures.interface import holds_stack
from .reranker import as_reranker
from .tensor_fit import check_fit
from .tensor_names import HEAD, OWN_HEADS
from .transformers_loading import build_model


def build_skeleton(checkpoint: Checkpoint, attention: str | None = None) -> nn.Module:
    """The class that `Checkpoint.load_model` gives, in evaluation mode, with linears and embeddings on the meta device.

    Args:
        checkpoint: the float model; only its config is read.
        attention: transformers' name of an attention implementation; None: its own choice.

    Raises:
        UnsupportedError: a model of sounds, or one of images that is not an encoder.
        CheckpointError: transformers cannot build it, or the checkpoint holds tensors that it does not take.
    """
    config = checkpoint.part_config()
    own_head = checkpoint.has(HEAD) or checkpoint.task == "fill" or checkpoint.model_type in OWN_HEADS
    if checkpoint.task not in PAIRS and own_head:
        config.tie_word_embeddings = checkpoint.tied  # which the flag alone does not say, see tied_head.py
    with weights_on_meta(holds_stack), no_init_weights():
        model: nn.Module = build_model(
            checkpoint.folder, config, checkpoint.trust_remote_code, checkpoint.task, attention
        )
    if (taken := main_input(model)) != input_of(checkpoint.task):
        raise UnsupportedError(
            f"{checkpoint.location}: {type(model).__name__} takes {taken}; models of text and encoders of images are "
            "supported"
        )
    split_experts(model)
    model.tie_weights()  # type: ignore[operator]
    if score := checkpoint.logit_score():
        as_reranker(model, score)
    if checkpoint.task in PAIRS:
        _untie(model, checkpoint)
    check_fit(model, checkpoint.owned(), checkpoint.location)
    return model.eval()


def _untie(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give tables that the config ties, but of which the file has different ones, a parameter each."""
    tied: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)  # type: ignore[operator]
    for name, source in tied.items():
        if checkpoint.has(name) and not checkpoint.same(name, source):
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.weight = nn.Parameter(torch.empty_like(owner.get_parameter("weight")), requires_grad=False)
