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
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from .checkpoint import Checkpoint
from .tensor_names import HEAD


def build_skeleton(checkpoint: Checkpoint, attention: str | None = None) -> nn.Module:
    """The class that `Checkpoint.load_model` gives, in evaluation mode, with linears and embeddings on the meta device.

    Args:
        checkpoint: the float model; only its config is read.
        attention: transformers' name of an attention implementation; None: its own choice.

    Raises:
        OSError, ValueError, RuntimeError, ImportError, KeyError: whatever transformers raises where it cannot.
    """
    trust = checkpoint.trust_remote_code
    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust)
    if checkpoint.has(HEAD):
        config.tie_word_embeddings = checkpoint.tied  # which the flag alone does not say, see tied_head.py
    kind = AutoModelForCausalLM if checkpoint.task == "generate" else AutoModel
    chosen = {} if attention is None else {"attn_implementation": attention}
    with on_meta_device(), no_init_weights():
        model: nn.Module = kind.from_config(config, dtype=torch.float32, trust_remote_code=trust, **chosen)
    model.tie_weights()  # type: ignore[operator]
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
