"""Calls that go on behind each other say what one call with all tokens says, row by row."""

from __future__ import annotations

import pytest
import torch
import transformers

from roundexport.families.configurations import families
from roundexport.model.handed_state import to_go_on


@torch.no_grad()
@pytest.mark.parametrize("family", ["rwkv", "llama"])
@pytest.mark.parametrize("prompt", [1, 4])
def test_three_rows_go_on(family: str, prompt: int) -> None:
    torch.manual_seed(0)
    row = families()[family]
    config = getattr(transformers, row.config)(**{**row.values, "vocab_size": 64})
    model = getattr(transformers, row.model)(config).eval()
    ids, told, found = torch.arange(4, 28).view(3, 8), None, []
    cache = transformers.DynamicCache(config=config)
    for begin, end in [(0, prompt), *((place, place + 1) for place in range(prompt, 8))]:
        new = ids[:, begin:end]
        told = model(input_ids=new, use_cache=True, **to_go_on(model, cache, new, told))
        found.append(told.logits)
    expected = model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(torch.cat(found, 1), expected, atol=1e-4 * float(expected.std()))
