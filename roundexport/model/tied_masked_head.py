"""Tensors that a head shares with the rest where the file has them once: of masked words, or a decoder's own name.

    cls.predictions.decoder.weight = bert.embeddings.word_embeddings.weight      and the like: the class says which,
    cls.predictions.decoder.bias   = cls.predictions.bias                        `_tied_weights_keys`

The rule is tied_head.py's: what is not in the file is the other's, unless config.json unties the words; what is in the
file twice with the same numbers counts once; with other numbers it is the file's own.
Limits: names as the class writes them; a class that transformers does not have (remote code) shares nothing here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .tied_head import OpenModel, wants_tied


def settle_masked_head(checkpoint: OpenModel, names: dict[str, str]) -> bool:
    """Give tensors that a class shares the values they have by the rule above.

    Args:
        checkpoint: a masked language model, or a decoder of tensor_names.OWN_HEADS, whose tensors can be read already.
        names: name in the model -> name in the file; entries of shared tensors are set.

    Returns:
        Whether words are tied: no matrix of the head is the file's own.
    """
    import transformers

    architecture = checkpoint.config["architectures"][0]
    shared: Any = getattr(getattr(transformers, architecture, None), "_tied_weights_keys", None)
    wanted = tied = wants_tied(checkpoint.config)
    for target, source in shared.items() if isinstance(shared, dict) else ():
        if source not in names and target in names:
            names[source] = names[target]
        bias = target.endswith(".bias")
        if source not in names or not (wanted or bias):
            continue
        if target in names and not np.array_equal(checkpoint.float32(target), checkpoint.float32(source)):
            tied = tied and bias
            continue
        names.pop(target, None)  # put back behind the other, which then counts as the owner
        names[target] = names[source]
    return tied
