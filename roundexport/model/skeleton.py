"""A transformers model without its weights, built from its config.

Linears and embeddings are on the meta device (shape, no values), experts as linears of their own among them, so a
skeleton of any size costs next to nothing; buffers such as rotary frequencies are computed by their own modules while
they are built, so they are real and right.
"""

from __future__ import annotations

from torch import nn
from transformers.initialization import no_init_weights

from roundexport.errors import UnsupportedError

from ._patches import weights_on_meta
from .checkpoint import Checkpoint
from .experts import split_experts
from .tensor_fit import check_fit
from .tensor_names import HEAD
from .transformers_loading import build_model, read_config, read_text_config


def build_skeleton(checkpoint: Checkpoint, attention: str | None = None) -> nn.Module:
    """The class that `Checkpoint.load_model` gives, in evaluation mode, with linears and embeddings on the meta device.

    Args:
        checkpoint: the float model; only its config is read.
        attention: transformers' name of an attention implementation; None: its own choice.

    Raises:
        UnsupportedError: a model of images or sounds.
        CheckpointError: transformers cannot build it, or the checkpoint holds tensors that it does not take.
    """
    where = checkpoint.folder, checkpoint.trust_remote_code
    config = read_text_config(*where, checkpoint.tied) if checkpoint.part else read_config(*where)
    if checkpoint.has(HEAD) or checkpoint.task == "fill":
        config.tie_word_embeddings = checkpoint.tied  # which the flag alone does not say, see tied_head.py
    with weights_on_meta(), no_init_weights():
        model: nn.Module = build_model(
            checkpoint.folder, config, checkpoint.trust_remote_code, checkpoint.task, attention
        )
    taken = getattr(model, "main_input_name", "input_ids")
    if taken != "input_ids":
        raise UnsupportedError(
            f"{checkpoint.location}: {type(model).__name__} takes {taken}; models of text are supported"
        )
    split_experts(model)
    model.tie_weights()  # type: ignore[operator]
    check_fit(model, checkpoint.owned(), checkpoint.location)
    return model.eval()
