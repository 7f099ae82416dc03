"""Greedy and beam search against transformers' own, over a table of next-token scores instead of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from roundexport.runtime.beam_search import SearchSettings, bound, search
from roundexport.runtime.start_tokens import StartTokens


@pytest.fixture(scope="module")
def bart(models: Any) -> Any:
    from transformers import BartForConditionalGeneration

    return BartForConditionalGeneration.from_pretrained(models("bart")).eval()


class _InTorch:
    """A backend that asks the transformers model, whole rows each time."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def encode(self, inputs: Any) -> Any:
        return inputs

    def info(self) -> dict[str, Any]:
        return {}

    def start(self, encoded: Any, beams: int = 1) -> Any:
        return _Rows(self.model, {name: np.repeat(values, beams, 0) for name, values in encoded.items()})


class _Rows:
    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        import torch

        self.model, self.inputs = model, {name: torch.from_numpy(values) for name, values in inputs.items()}
        self.rows: Any = None

    @property
    def length(self) -> int:
        return 0 if self.rows is None else int(self.rows.shape[1])

    def step(self, ids: Any, order: Sequence[int] | None = None) -> Any:
        import torch

        past = self.rows if self.rows is None or order is None else self.rows[list(order)]
        self.rows = ids if past is None else np.concatenate([past, ids], 1)
        with torch.no_grad():
            out = self.model(**self.inputs, decoder_input_ids=torch.from_numpy(self.rows)).logits
        return out[:, -ids.shape[1] :].numpy()

    def close(self) -> None: ...

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize(
    ("beams", "options"),
    [
        (1, {}),
        (4, {}),
        (3, {"length_penalty": 2.0}),
        (4, {"early_stopping": True}),
        (2, {"no_repeat_ngram_size": 2}),
        (4, {"forced_bos_token_id": 7, "forced_eos_token_id": 0, "suppress_tokens": [5, 6, 9]}),
    ],
)
def test_answers_are_those_of_transformers(bart: Any, beams: int, options: dict[str, Any]) -> None:
    import torch

    generator = np.random.default_rng(beams)
    ids = generator.integers(4, 384, (3, 9))
    mask = np.ones_like(ids)
    mask[1, 6:], ids[1, 6:] = 0, 1
    settings = {"num_beams": beams, "max_new_tokens": 24, "do_sample": False, "forced_eos_token_id": None, **options}
    with torch.no_grad():
        expected = bart.generate(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            eos_token_id=[0, 11, 12, 13],
            **settings,
        ).tolist()
    tokens = StartTokens(
        decoder_start=1, forced_bos=options.get("forced_bos_token_id"), forced_eos=options.get("forced_eos_token_id"),
        suppress=tuple(options.get("suppress_tokens", ())), no_repeat_ngram_size=options.get("no_repeat_ngram_size", 0),
    )  # fmt: skip
    found = search(
        _InTorch(bart),
        {"input_ids": ids, "attention_mask": mask},
        np.full((3, 1), 1),
        [0, 11, 12, 13],
        SearchSettings(beams, options.get("length_penalty", 1.0), options.get("early_stopping", False), 25),
        bound(tokens, 1, 25),
    )
    for answer, row in zip(found, expected, strict=True):
        assert list(answer.tokens) == row[1 : 1 + len(answer.tokens)]
        assert set(row[1 + len(answer.tokens) :]) <= {1}
