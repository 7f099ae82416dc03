"""Text that a decoder writes itself: ancestral sampling at temperature 1 from a beginning that is given to it.

    first token        beginning-of-sequence, else end-of-sequence
    a user's turn      of a model with a chat template, every other sample: what the template puts before a user's first
                       word; the model then writes question and answer, and what may follow

Each token is drawn from the model's own distribution, without truncation, so samples come from the very distribution
that has to survive quantization, and nothing has to be downloaded.  Who writes is a :class:`Writer`: the model in
torch, or something faster that stands for it.  What was written is kept for the next run, under the model's digest, the
seed, beginnings, length and writer (storage/tensor_cache.py).  An end-of-sequence token is a token like any other:
what follows is a new text, as in packed training data.  Source of the second beginning: Magpie, arXiv 2406.08464.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from roundexport.environment.versions import library_versions
from roundexport.errors import Interrupted, RoundexportError, UsageError
from roundexport.model.handed_state import to_go_on
from roundexport.model.model_config import hidden_width
from roundexport.model.special_tokens import first_token
from roundexport.storage.tensor_cache import TensorCache, key_of

from .chat import user_turn

if TYPE_CHECKING:
    import torch

    from roundexport.model.checkpoint import Checkpoint

Ids = NDArray[np.int64]

WRITING_BYTES = 1 << 30
"""What writing takes beside the weights: keys, values, and what a forward has alive."""
_KV_BYTES = 512 << 20  # keys and values held while a model writes its samples


Report = Callable[[float, str], None]
CACHE = TensorCache("written-text", 256 << 20)
_CHUNK = 256  # probabilities that are summed before one of their sums is chosen
_VERSION = 2  # of how tokens are drawn
_DRAWN = -1  # in beginnings: a token that the model draws
_LARGEST_HEAD = 4  # a user's turn is a beginning where what the template puts first is at most this part of a sample


class Writer(Protocol):
    """What writes samples in place of the model in torch."""

    def called(self, checkpoint: Checkpoint) -> str:
        """What writes, in words; what is called the same writes the same."""

    def worth_it(self, checkpoint: Checkpoint, num_samples: int, length: int) -> bool:
        """Whether it is faster for so much text."""

    def __call__(self, checkpoint: Checkpoint, begun: Ids, length: int, seed: int, report: Report) -> Ids:
        """Samples int64 [N, length] that begin as ``begun`` [N, P] says, see :func:`beginnings`."""


@dataclass(frozen=True, eq=False)
class Written:
    """Samples that the model wrote.

    Args:
        ids: int64 [samples, length].
        identity: for a manifest: ``source``, how they were written, ``begun``, where some begin with a user's turn, and
            ``instead_of``, the writer that could not.
    """

    ids: Ids
    identity: dict[str, str]


def _unheard(*_: object) -> None: ...


def written_samples(  # noqa: PLR0913  (what is asked for, what is at hand, and where to tell)
    checkpoint: Checkpoint,
    num_samples: int,
    length: int,
    seed: int,
    *,
    model: torch.nn.Module | None = None,
    writer: Writer | None = None,
    report: Report = _unheard,
    say: Callable[[str], None] = _unheard,
    fits: Callable[[], None] = _unheard,
) -> Written:
    """Samples that the model writes, or has written before, and how they were written.

    The one rule of who writes: the writer where it is worth it and can, else the model in torch.

    Args:
        checkpoint: a decoder.
        num_samples: rows.
        length: tokens per row, the first one included.
        seed: of the drawing.
        model: the loaded model, where the caller has it already.
        writer: what writes in its place where that is worth it; where it fails, the model writes.
        report: called with the share that is done, and where the work is.
        say: told at once that the writer cannot, and why.
        fits: raises where the model, which is then loaded whole, does not fit in memory; called before it writes.

    Raises:
        UsageError: the model names no token to begin with.
        KeyboardInterrupt: on Ctrl-C, whatever the writer was at.
    """
    begun = beginnings(checkpoint, num_samples, length)
    turns = {"begun": "every other one with a user's turn"} if begun.shape[1] > 1 else {}
    instead_of: dict[str, str] = {}
    if writer is not None and writer.worth_it(checkpoint, num_samples, length):
        name = writer.called(checkpoint)
        key = _key(checkpoint, begun, length, seed, name)
        ids = _remembered(key)
        try:
            ids = writer(checkpoint, begun, length, seed, report) if ids is None else ids
        except Interrupted as stop:  # of what the writer runs; what it says to resume is not the user's
            raise KeyboardInterrupt from stop
        except (RoundexportError, ImportError) as error:  # a model that cannot be exported can still be tuned
            say(f"note: the model writes its text in torch, which takes longer; its {name} cannot: {error}")
            instead_of = {"instead_of": name}
        else:
            CACHE.put(key, {"ids": ("I64", ids)})
            return Written(ids, {"source": f"sampled at temperature 1 from the model's {name}", **turns})
    key = _key(checkpoint, begun, length, seed, "torch")
    ids = _remembered(key)
    if ids is None:
        fits()
        ids = write_samples(model or checkpoint.load_model(), checkpoint, begun, length, seed, report)
        CACHE.put(key, {"ids": ("I64", ids)})
    return Written(ids, {"source": "sampled from the model at temperature 1", **turns, **instead_of})


def _key(checkpoint: Checkpoint, begun: Ids, length: int, seed: int, by: str) -> str:
    return key_of(
        version=_VERSION, model=checkpoint.digest, begun=begun.tolist(), length=length, seed=seed, by=by,
        versions=library_versions(),
    )  # fmt: skip


def _remembered(key: str) -> Ids | None:
    found = CACHE.get(key)
    return None if found is None else found["ids"]


def first_of(checkpoint: Checkpoint) -> int:
    """The token that a text begins with.

    Raises:
        UsageError: the model names none.
    """
    first = first_token(checkpoint.tokens)
    if first is None:
        raise UsageError(
            "calibration self: the model's config names no bos or eos token to begin with; give a text file"
        )
    return first


def beginnings(checkpoint: Checkpoint, num_samples: int, length: int) -> Ids:
    """What samples begin with: the first token, and every other one of a chat model with a user's turn.

    Args:
        checkpoint: a decoder.
        num_samples: N.
        length: tokens per sample.

    Returns:
        int64 [N, P], -1 where the model draws the token.

    Raises:
        UsageError: the model names no token to begin with.
    """
    turn = user_turn(checkpoint)
    opened = [[first_of(checkpoint)]]
    if 0 < len(turn) * _LARGEST_HEAD <= length:
        opened.append(turn)
    rows = [opened[row % len(opened)] for row in range(num_samples)]
    found = np.full((num_samples, max(map(len, rows))), _DRAWN, np.int64)
    for row, tokens in enumerate(rows):
        found[row, : len(tokens)] = tokens
    return found


def begin(drawn: Ids, begun: Ids, position: int) -> Ids:
    """Tokens [N] at a position: those of the beginnings, else those that were drawn."""
    if position >= begun.shape[1]:
        return drawn
    return np.where(begun[:, position] == _DRAWN, drawn, begun[:, position])


def can_write(checkpoint: Checkpoint) -> bool:
    """Whether the model can write samples: a decoder that names a token to begin with."""
    return checkpoint.task == "generate" and first_token(checkpoint.tokens) is not None


def write_samples(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    begun: Ids,
    length: int,
    seed: int,
    report: Report = _unheard,
) -> Ids:
    """Let a decoder write samples: each token drawn from the model's own distribution, no truncation.

    An end-of-sequence token is a token like any other: what follows is a new text, as in packed training data.

    Args:
        model: causal language model in evaluation mode.
        checkpoint: the same on disk.
        begun: what they begin with, int64 [N, P]; see :func:`beginnings`.
        length: tokens per row, the beginning included.
        seed: of the drawing.
        report: called with the share that is done, and where the work is.

    Returns:
        int64 [N, length].
    """
    import torch
    from transformers import StaticCache

    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    batch = rows_at_a_time(checkpoint.config, length)
    rows = []
    for start in range(0, len(begun), batch):
        own = begun[start : start + batch]
        ids = np.empty((len(own), length), np.int64)
        ids[:, 0] = own[:, 0]
        cache = StaticCache(config=model.config, max_cache_len=length)  # half the time of one that grows by copying
        told = None
        with torch.no_grad():
            for position in range(1, length):
                last = torch.from_numpy(ids[:, position - 1 : position]).to(device)
                told = model(input_ids=last, use_cache=True, **to_go_on(model, cache, last, told))
                logits = told.logits[:, -1]
                ids[:, position] = begin(draw_tokens(logits.float().cpu(), generator).numpy(), own, position)
                report((start + len(ids) * position / length) / len(begun), f"{start} samples written")
        rows.append(ids)
    return np.concatenate(rows)


def draw_tokens(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token per row from softmax(logits [B, V]), by inverting the cumulative distribution; int64 [B].

    The distribution is summed in chunks first: one is chosen by their sums, then a token inside it, so that only one
    chunk per row is accumulated.
    """
    import torch

    weights = torch.softmax(logits.float(), -1)
    count = weights.shape[-1]
    chunks = torch.nn.functional.pad(weights, (0, -count % _CHUNK)).view(len(weights), -1, _CHUNK)
    before = chunks.sum(-1).double().cumsum(-1)
    threshold = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64) * before[:, -1:]
    chosen = torch.searchsorted(before, threshold, right=True).clamp(max=before.shape[-1] - 1)
    inside = chunks.gather(1, chosen[:, :, None].expand(-1, -1, _CHUNK))[:, 0].double().cumsum(-1)
    rest = threshold - before.gather(1, chosen) + inside[:, -1:]
    token = torch.searchsorted(inside, rest, right=True).clamp(max=_CHUNK - 1)
    return (chosen * _CHUNK + token)[:, 0].clamp(max=count - 1)


def rows_at_a_time(config: dict[str, Any], length: int) -> int:
    """Samples written at a time: a fixed amount of keys and values, so that no machine draws other ids."""
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 32)
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 32)
    hidden = hidden_width(config) or 4096
    width = int(config.get("num_key_value_heads") or heads) * int(config.get("head_dim") or hidden // heads)
    return max(1, min(128, _KV_BYTES // (layers * 2 * width * 4 * length)))
