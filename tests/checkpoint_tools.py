"""What the tests of checkpoints share: every tensor compared with the loaded model's."""

from __future__ import annotations

from typing import Any

import numpy as np

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
