"""A transformers model without its weights, built from its config.

Linears and embeddings are on the meta device (shape, no values), so a skeleton of any size costs next to nothing;
buffers such as rotary frequencies are computed by their own modules while they are built, so they are real and right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from .checkpoint import Checkpoint
from .tensor_fit import check_fit
from .tensor_names import HEAD
from .transformers_loading import build_model, read_config


def build_skeleton(checkpoint: Checkpoint, attention: str | None = None) -> nn.Module:
    """The class that `Checkpoint.load_model` gives, in evaluation mode, with linears and embeddings on the meta device.

    Args:
        checkpoint: the float model; only its config is read.
        attention: transformers' name of an attention implementation; None: its own choice.

    Raises:
        CheckpointError: transformers cannot build it, or the checkpoint holds tensors that it does not take.
    """
    config = read_config(checkpoint.folder, checkpoint.trust_remote_code)
    if checkpoint.has(HEAD):
        config.tie_word_embeddings = checkpoint.tied  # which the flag alone does not say, see tied_head.py
    causal = checkpoint.task == "generate"
    with on_meta_device(), no_init_weights():
        model: nn.Module = build_model(checkpoint.folder, config, checkpoint.trust_remote_code, causal, attention)
    model.tie_weights()  # type: ignore[operator]
    check_fit(model, checkpoint.owned(), checkpoint.location)
    return model.eval()


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Build linears and embeddings on the meta device inside this block, so that a skeleton costs no memory."""
    originals: list[tuple[type[nn.Module], Callable[..., None]]] = []
    for kind in (nn.Linear, nn.Embedding, Conv1D):
        original = kind.__init__
        originals.append((kind, original))

        def on_meta(self: nn.Module, *args: Any, __original: Callable[..., None] = original, **kwargs: Any) -> None:
            with torch.device("meta"):
                __original(self, *args, **kwargs)

        kind.__init__ = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kind, original in originals:
            kind.__init__ = original  # type: ignore[method-assign]
