"""Sampling against the definitions of its cuts, and its frequencies against the probabilities."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from roundexport.runtime import GenerationSettings, sampling
from roundexport.runtime.sampling import Sampler, candidates, largest, penalised


def logits(size: int, seed: int = 0, spread: float = 3.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def softmax(values: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    weights = np.exp((values.astype(np.float64) - values.max()) / temperature)
    return weights / weights.sum()  # type: ignore[no-any-return]


def cut_by_definition(values: NDArray[np.float32], settings: GenerationSettings) -> set[int]:
    """Kept tokens, from a full sort."""
    order = np.argsort(-values, kind="stable")[: settings.top_k or len(values)]
    p = softmax(values[order], settings.temperature)
    before = p.cumsum() - p
    kept = (before < settings.top_p) & (p >= settings.min_p * p[0])
    return set(order[kept].tolist())


@pytest.mark.parametrize("size", [50, 4000])
@pytest.mark.parametrize("spread", [0.05, 3.0])
@pytest.mark.parametrize(
    "cuts",
    [{}, {"top_k": 5}, {"top_k": 1000}, {"top_p": 0.3}, {"top_p": 0.95}, {"min_p": 0.1},
     {"top_k": 40, "top_p": 0.8, "min_p": 0.02}],
    ids=str,
)  # fmt: skip
def test_candidates_are_what_a_full_sort_keeps(size: int, spread: float, cuts: dict[str, float]) -> None:
    settings = GenerationSettings(temperature=0.7, **cuts)  # type: ignore[arg-type]
    values = logits(size, seed=size, spread=spread)
    tokens, p = candidates(values, settings)
    assert set(tokens.tolist()) == cut_by_definition(values, settings)
    assert (np.diff(p) <= 0).all() and tokens[0] == values.argmax()
    if settings.top_k == 0:
        assert np.allclose(p, softmax(values, 0.7)[tokens], rtol=1e-9)


def test_the_short_list_is_left_when_it_holds_too_little_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_SHORT_LIST", 4)
    settings = GenerationSettings(temperature=1.0, top_p=0.9)
    values = logits(100, spread=0.1)
    assert set(candidates(values, settings)[0].tolist()) == cut_by_definition(values, settings)


@pytest.mark.parametrize("count", [1, 3, 10])
def test_largest_are_sorted_and_ties_go_by_index(count: int) -> None:
    values = np.array([1, 5, 5, 2, 5, 0, 9, 9, 3, 4], np.float32)
    expected = sorted(range(10), key=lambda i: (-values[i], i))[:count]
    found = largest(values, count).tolist()
    assert [values[i] for i in found] == [values[i] for i in expected]
    assert (
        found == expected if count != 3 else found[:2] == expected[:2]
    )  # which of equal ones at the border is kept is open


def test_drawn_tokens_follow_the_probabilities() -> None:
    values = logits(8, spread=1.0)
    sampler = Sampler(GenerationSettings(temperature=1.3, seed=7), [[0]])
    n = 20_000
    counts = np.bincount([int(sampler.pick(values[None])[0]) for _ in range(n)], minlength=8)
    p = softmax(values, 1.3)
    # Binomial standard deviation; chance passes 5 of them for one of 8 counts once in 200 000 runs; the seed is fixed.
    assert (np.abs(counts - n * p) < 5 * np.sqrt(n * p * (1 - p))).all()


def test_greedy_takes_the_likeliest_and_draws_nothing() -> None:
    values = np.stack([logits(100, 1), logits(100, 2)])
    assert Sampler(GenerationSettings(), [[0], [0]]).pick(values).tolist() == values.argmax(1).tolist()


def test_top_k_of_one_is_greedy_at_any_temperature() -> None:
    values = logits(100)[None]
    sampler = Sampler(GenerationSettings(temperature=5.0, top_k=1), [[0]])
    assert {int(sampler.pick(values)[0]) for _ in range(20)} == {int(values.argmax())}


def test_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    values = np.array([2.0, -2.0, 3.0, 0.5], np.float32)
    assert penalised(values, {0, 1}, 2.0).tolist() == [1.0, -4.0, 3.0, 0.5]
    assert values.tolist() == [2.0, -2.0, 3.0, 0.5]


def test_penalty_counts_the_prompt_and_each_new_token() -> None:
    sampler = Sampler(GenerationSettings(repetition_penalty=2.0), [[0]])
    values = np.array([[4.0, 3.0, 2.9, 1.0]], np.float32)
    assert [int(sampler.pick(values)[0]) for _ in range(3)] == [1, 2, 0]


def test_huge_logits_and_tiny_temperatures_do_not_overflow() -> None:
    values = np.array([[1e30, -1e30, 9e29]], np.float32)
    assert Sampler(GenerationSettings(temperature=1e-6, top_p=0.9), [[0]]).pick(values).tolist() == [0]
