"""What the tests of checkpoints share: weights that matter, and every tensor compared with the loaded model's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from roundexport.model.checkpoint import Checkpoint


def assert_holds_the_model(checkpoint: Checkpoint) -> Any:
    """Every parameter of the loaded model is there under its own name, bit for bit."""
    model = checkpoint.load_model()
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert checkpoint.has(name), name
        assert checkpoint.shape(name) == tuple(tensor.shape)
        values = checkpoint.float32(name)
        assert values.dtype == np.float32
        assert np.array_equal(values, tensor.float().numpy()), name
    return model


@torch.no_grad()
def spread_weights(model: torch.nn.Module) -> None:
    """Random weights large enough that logits are not flat; norms and biases that are not all one or zero."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.std() > 0:
            parameter.mul_(0.25 / parameter.std())
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
