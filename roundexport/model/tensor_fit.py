"""Whether a checkpoint holds the tensors of the model that its config describes: none left over, all of its shapes.

A tensor that no parameter takes is a scale nobody applies, a layer nobody runs or a head nobody asks: the model that
comes out is another one.  Such tensors are refused by name.  Harmless are

    buffers that classes once stored       rotary frequencies, causal masks, position ids: computed anew from the config
    what transformers' class itself skips  `_keys_to_ignore_on_load_unexpected`, such as layers for further tokens
    poolers                                no output that is used here depends on them

Missing tensors are told by whoever reads them.  Names that transformers converts while loading are its
own business and pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from roundexport.errors import ArtifactError, CheckpointError

from .experts import split_prefixes

_LEFTOVERS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|inv_freq|masked_bias|position_ids|token_type_ids"
    r"|num_batches_tracked|(attn|attention|self_attn|self)\.bias)$|pooler"
)


def check_fit(model: nn.Module, stored: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Hold every tensor of a checkpoint against the model's parameters and buffers.

    Args:
        model: the model; a skeleton will do.
        stored: shape by name of the checkpoint's tensors.
        where: the model, for the error.

    Raises:
        CheckpointError: tensors that the model does not take, or takes in another shape.
    """
    taken = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    mapping = get_model_conversion_mapping(model)
    experts = split_prefixes(model)
    unknown = []
    for name, shape in stored.items():
        if not name.startswith(experts) and any(item.rename_source_key(name)[1] for item in mapping):
            continue
        if name not in taken:
            unknown.append(name)
        elif shape != taken[name]:
            raise CheckpointError(
                f"{where}: {name} is {list(shape)} in the weights, but config.json makes it {list(taken[name])}"
            )
    refuse_unknown(unknown, model, where)


def check_overrides(model: nn.Module, overrides: Mapping[str, NDArray[np.float32]]) -> None:
    """Hold float tensors that tuning changed against the model's parameters.

    Args:
        model: the model; a skeleton will do.
        overrides: values by parameter name.

    Raises:
        ArtifactError: a name that is not a parameter, another shape, or values that are not finite.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, values in overrides.items():
        if name not in shapes:
            raise ArtifactError(f"the artifact overrides {name}, which {type(model).__name__} does not have")
        if values.shape != shapes[name]:
            raise ArtifactError(
                f"the artifact overrides {name} with {list(values.shape)}, where the model has {list(shapes[name])}"
            )
        if not np.isfinite(values).all():
            raise ArtifactError(f"the artifact overrides {name} with values that are not finite (NaN or inf)")


def refuse_unknown(names: Iterable[str], model: nn.Module, where: str) -> None:
    """Refuse tensors that the model does not take, but for harmless leftovers.

    Raises:
        CheckpointError: there are such tensors.
    """
    skipped = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    left = sorted(
        name for name in names if not _LEFTOVERS.search(name) and not any(skip.search(name) for skip in skipped)
    )
    if left:
        raise CheckpointError(
            f"{where}: the weights hold {len(left)} tensors that {type(model).__name__} does not take, the first is "
            f"{left[0]}; config.json describes another model, or the file has been changed"
        )
