"""Samples of models with an encoder and a decoder: sources, and answers that the model itself writes to them.

    sources   text, as for any model; of `self` words drawn from the vocabulary; of speech the features of sounds
    answers   sampled at temperature 1 from what the decoder says of the source, from its first token on; behind an
              end-of-sequence token there is padding, which does not count

A sample's token ids are [source | answer], the source one token longer, so that no length is both; of speech the answer
alone, and its features are read again from the sounds.  Answers are made by the float model, as its own words are what
the decoder sees when it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

from roundexport.errors import UsageError
from roundexport.model.cache_argument import cache_argument
from roundexport.model.model_config import read_generation_config

if TYPE_CHECKING:
    from roundexport.model.checkpoint import Checkpoint

Ids = NDArray[np.int64]
ANSWER = "decoder_input_ids"
_BATCH = 8


def split_sample(checkpoint: Checkpoint, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sources and answers of samples [n, E + S]; no sources of speech."""
    own = 0 if checkpoint.task == "transcribe" else (ids.shape[1] + 1) // 2
    return ids[:, :own], ids[:, own:]


def answers_to(
    model: nn.Module,
    checkpoint: Checkpoint,
    sources: dict[str, Tensor],
    length: int,
    seed: int,
    report: Callable[[float, str], None] = lambda share, where: None,
) -> Ids:
    """Answers [n, length] to sources.

    Args:
        model: the float model.
        checkpoint: where it is from.
        sources: its encoder's argument by name, samples along the first axis.
        length: tokens of an answer, those it begins with included.
        seed: of the drawing.
        report: called with the share that is done, and where it is.

    Raises:
        UsageError: the model's files name no token that an answer begins with.
    """
    begin, special = first_tokens(checkpoint), checkpoint.tokens
    count = len(next(iter(sources.values())))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for start in range(0, count, _BATCH):
        batch = {name: values[start : start + _BATCH] for name, values in sources.items()}
        found.append(_drawn(model, batch, begin, length, generator, special["eos"], special["pad"] or 0))
        report(min(count, start + _BATCH) / count, f"answers to {count} sources")
    return torch.cat(found).numpy()


def first_tokens(checkpoint: Checkpoint) -> list[int]:
    """The tokens that every answer begins with.

    Raises:
        UsageError: the model's files name none.
    """
    generation = read_generation_config(checkpoint.folder)
    found: dict[str, Any] = {**checkpoint.config, **{key: v for key, v in generation.items() if v is not None}}
    start = found.get("decoder_start_token_id")
    if start is None:
        raise UsageError(f"{checkpoint.location}: neither config.json nor generation_config.json has a start token")
    more = [found.get("forced_bos_token_id"), found.get("no_timestamps_token_id")]
    return [int(start), *(int(token) for token in more if isinstance(token, int))]


def _drawn(
    model: nn.Module,
    sources: dict[str, Tensor],
    begin: list[int],
    length: int,
    generator: torch.Generator,
    eos: tuple[int, ...],
    pad: int,
) -> Tensor:
    with torch.no_grad():
        states = model.get_encoder()(**sources)[0]  # type: ignore[operator]
        ids = torch.tensor([begin[:length]]).repeat(len(states), 1)
        new, cache, ended = ids, None, torch.zeros(len(states), dtype=torch.bool)
        while ids.shape[1] < length and not ended.all():
            out = model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states), decoder_input_ids=new, use_cache=True,
                **({} if cache is None else cache_argument(model, cache)),
            )  # fmt: skip
            cache = out.past_key_values
            chances = torch.softmax(out.logits[:, -1].double(), -1)
            new = torch.multinomial(chances, 1, generator=generator)
            new[ended] = pad
            ended |= torch.isin(new[:, 0], torch.tensor(eos, dtype=torch.long))
            ids = torch.cat([ids, new], 1)
    return functional.pad(ids, (0, length - ids.shape[1]), value=pad)
