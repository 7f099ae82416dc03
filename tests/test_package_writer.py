"""Text written by the 8-bit package: of the model's distribution, the same for a seed, and only where it pays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from roundexport.model.checkpoint import Checkpoint
from roundexport.package_writer import PackageWriter


def test_a_package_writes_what_the_model_would(models: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    writer, places = PackageWriter("onnx"), list[str]()
    ids = writer(checkpoint, 2000, 3, 1, lambda _, place: places.append(place))
    assert ids.shape == (2000, 3) and (ids[:, 0] == 0).all() and places[0] == "rounding to 8 bits"
    with torch.no_grad():
        logits = checkpoint.load_model()(input_ids=torch.zeros(1, 1, dtype=torch.long)).logits[0, -1]
    likely = torch.softmax(logits, -1).numpy()
    counts = np.bincount(ids[:, 1], minlength=len(likely)) / len(ids)
    top = likely.argsort()[-20:]
    # Binomial: five standard deviations, and what eight bits change.
    assert (np.abs(counts - likely)[top] <= 5 * np.sqrt(likely[top] / len(ids)) + 0.05 * likely[top]).all()


def test_little_text_of_a_small_model_is_not_worth_a_package(models: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    assert not PackageWriter("onnx").worth_it(checkpoint, 128, 512)
    assert PackageWriter("onnx").worth_it(checkpoint, 10**6, 10**4)
