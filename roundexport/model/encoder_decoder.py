"""Models with an encoder and a decoder: which are read, what their tables of tokens share, and what is not in the file.

    task         `transcribe` where the config has mel bins, `translate` where both halves read token ids
    tables       encoder.embed_tokens, decoder.embed_tokens and the head are, unless the file has their own,
                 `shared`; without one the head is decoder.embed_tokens
    positions    Marian's are sines and cosines, which its files leave out:
                 table[p, j] = sin(p / 10000^(2j/D)), table[p, D/2 + j] = cos(p / 10000^(2j/D))

Where two of these tables are both in the file with equal values they are one table, as in transformers.
Source: `_tied_weights_keys` and MarianSinusoidalPositionalEmbedding of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import CheckpointError, UnsupportedError
from roundexport.types import Task

from .tied_head import OpenModel, equal

_HEADS = ("lm_head.weight", "proj_out.weight")
_PREFIXES = ("", "model.")
_OTHER_INPUTS = ("vision_config", "audio_config", "encoder", "speech_encoder_layers", "image_size", "conv_kernel_sizes")
_SINES = frozenset(["marian"])


def task_of_pair(config: Mapping[str, Any], folder: Path) -> Task:
    """What a model with an encoder and a decoder is for.

    Raises:
        UnsupportedError: it answers in another way than with tokens, or reads neither token ids nor mel features.
    """
    name = str((config.get("architectures") or [""])[0])
    if not name.endswith(("ForConditionalGeneration", "MTModel")):
        raise UnsupportedError(
            f"{folder}: {name} has an encoder and a decoder and does not answer in tokens; classes "
            "…ForConditionalGeneration and …MTModel are supported"
        )
    if other := [key for key in _OTHER_INPUTS if config.get(key) is not None]:
        raise UnsupportedError(
            f"{folder}: {name} reads more than token ids or mel features ({other[0]}); that is not exported"
        )
    return "transcribe" if config.get("num_mel_bins") else "translate"


def settle_tables(checkpoint: OpenModel, names: dict[str, str]) -> bool:
    """Give tables of tokens that the file leaves out the table they share.

    Args:
        checkpoint: the model, whose tensors can be read already.
        names: name in the model -> name in the file; entries are added.

    Returns:
        Whether the head is an embedding.

    Raises:
        CheckpointError: the file has no table for the decoder, or the head is neither in the file nor shared.
    """
    prefix = next((prefix for prefix in _PREFIXES if f"{prefix}shared.weight" in names), None)
    if prefix is not None:
        owner, halves = (
            f"{prefix}shared.weight",
            [f"{prefix}{half}.embed_tokens.weight" for half in ("encoder", "decoder")],
        )
        for name in halves:
            _share(checkpoint, names, name, owner)
    else:
        prefix = next((prefix for prefix in _PREFIXES if f"{prefix}decoder.embed_tokens.weight" in names), None)
        if prefix is None:
            raise CheckpointError(f"{checkpoint.location}: the weights hold no embedding of the decoder's tokens")
        owner = f"{prefix}decoder.embed_tokens.weight"
    head = next((name for name in _HEADS if name in names), None)
    if head is None:
        head = _HEADS["num_mel_bins" in checkpoint.config]
        if checkpoint.config.get("tie_word_embeddings") is False and checkpoint.model_type not in _FLAG_IS_OF_THE_SCALE:
            raise CheckpointError(
                f"{checkpoint.location}: the weights lack {head}, and config.json says tie_word_embeddings false; "
                "fetch the model again, or set it to true if the embedding is the head"
            )
    return _share(checkpoint, names, head, owner)


_FLAG_IS_OF_THE_SCALE = frozenset(["t5", "mt5", "umt5", "longt5"])
"""Families in which tie_word_embeddings says whether outputs are scaled, and tables are tied whatever it says."""


def _share(checkpoint: OpenModel, names: dict[str, str], name: str, owner: str) -> bool:
    """Let a table be another, where the file has none or an equal one; whether it is."""
    if name in names and not equal(checkpoint, name, owner):
        return False
    names.pop(name, None)  # put back behind the table that it is, which then counts as the weight's owner
    names[name] = names[owner]
    return True


def computed_tensors(config: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Tensors of the model that are computed from its config, as its files leave them out."""
    if config.get("model_type") not in _SINES:
        return
    table = sines(int(config.get("max_position_embeddings") or 1024), int(config["d_model"]))
    for half in ("encoder", "decoder"):
        if (name := f"model.{half}.embed_positions.weight") not in names:
            yield name, table


def sines(positions: int, width: int) -> NDArray[np.float32]:
    """A table of positions [positions, width], see above."""
    columns = np.arange(width)
    angles = np.arange(positions)[:, None] / np.power(10000.0, 2 * (columns // 2) / width)[None]
    middle = width // 2 + width % 2
    table = np.empty((positions, width), np.float32)
    table[:, :middle] = np.sin(angles[:, 0::2])
    table[:, middle:] = np.cos(angles[:, 1::2])
    return table
