"""Text that a decoder writes itself: ancestral sampling at temperature 1 from its beginning-of-sequence token.

Each token is drawn from the model's own distribution, without truncation, so samples come from the very distribution
that has to survive quantization, and nothing has to be downloaded.  An end-of-sequence token is a token like any other:
what follows is a new text, as in packed training data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import UsageError
from roundexport.model.special_tokens import first_token

if TYPE_CHECKING:
    import torch

    from roundexport.model.checkpoint import Checkpoint

Ids = NDArray[np.int64]

WRITING_BYTES = 1 << 30
"""What writing takes beside the weights: keys, values, and what a forward has alive."""
_KV_BYTES = 512 << 20  # keys and values held while a model writes its samples


def can_write(checkpoint: Checkpoint) -> bool:
    """Whether the model can write samples: a decoder that names a token to begin with."""
    return checkpoint.task == "generate" and first_token(checkpoint.tokens) is not None


def write_samples(model: torch.nn.Module, checkpoint: Checkpoint, num_samples: int, length: int, seed: int) -> Ids:
    """Let a decoder write samples: each token drawn from the model's own distribution, no truncation.

    An end-of-sequence token is a token like any other: what follows is a new text, as in packed training data.

    Args:
        model: causal language model in evaluation mode.
        checkpoint: the same on disk.
        num_samples: rows.
        length: tokens per row, the first one included.
        seed: of the drawing.

    Returns:
        int64 [num_samples, length].

    Raises:
        UsageError: the model names no token to begin with.
    """
    import torch
    from transformers import StaticCache

    first = first_token(checkpoint.tokens)
    if first is None:
        raise UsageError(
            "calibration self: the model's config names no bos or eos token to begin with; give a text file"
        )
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    batch = _kv_batch(checkpoint.config, length)
    rows = []
    for start in range(0, num_samples, batch):
        ids = torch.full((min(batch, num_samples - start), length), first)
        cache = StaticCache(config=model.config, max_cache_len=length)  # half the time of one that grows by copying
        with torch.no_grad():
            for position in range(1, length):
                last = ids[:, position - 1 : position].to(device)
                logits = model(input_ids=last, past_key_values=cache, use_cache=True).logits[:, -1]
                ids[:, position] = draw_tokens(logits.float().cpu(), generator)
        rows.append(ids)
    return torch.cat(rows).numpy()


def draw_tokens(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token per row from softmax(logits [B, V]), by inverting the cumulative distribution; int64 [B]."""
    import torch

    cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
    threshold = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _kv_batch(config: dict[str, Any], length: int) -> int:
    """Samples written at a time: a fixed amount of keys and values, so that no machine draws other ids."""
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 32)
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 32)
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 4096)
    width = int(config.get("num_key_value_heads") or heads) * int(config.get("head_dim") or hidden // heads)
    return max(1, min(128, _KV_BYTES // (layers * 2 * width * 4 * length)))
