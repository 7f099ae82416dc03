"""Sampling against the definitions of its cuts, and its frequencies against the probabilities."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from roundexport.runtime import GenerationSettings
from roundexport.runtime.sampling import Sampler, candidates, drawn, largest, penalized


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
    tokens, weights = candidates(values, settings)
    ordered = settings.top_p < 1 or 0 < settings.top_k < size
    assert (tokens is None) == (not ordered and settings.min_p == 0)
    tokens = np.arange(size) if tokens is None else tokens
    assert set(tokens.tolist()) == cut_by_definition(values, settings)
    if ordered:
        assert (np.diff(weights) <= 0).all() and tokens[0] == values.argmax()
    p = softmax(values, 0.7)
    # float32: the argument of exp, at most 40 here, is rounded to 2⁻²⁴ of itself, three times over.
    assert np.allclose(weights, p[tokens] / p.max(), rtol=40 * 3 * 2**-24)


@pytest.mark.parametrize("top_p", [1e-300, 0.2, 0.5, 0.999])
def test_equal_logits_are_cut_in_order_of_their_ids(top_p: float) -> None:
    settings = GenerationSettings(temperature=1.0, top_p=top_p)
    tokens, _ = candidates(np.zeros(1000, np.float32), settings)
    assert tokens is not None and tokens.tolist() == list(range(max(1, round(top_p * 1000))))


def test_a_draw_on_the_border_is_not_a_forbidden_token(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(GenerationSettings(temperature=1.0))
    values = np.array([1, -np.inf, 2, -np.inf], np.float32)
    for point, token in ((0.0, 0), (np.nextafter(1, 0), 2), (1.0, 2)):
        monkeypatch.setattr(sampler, "_random", SimpleNamespace(random=lambda point=point: point))
        assert sampler.choose(values).token == token


@pytest.mark.parametrize("count", [1, 3, 10, 40])
@pytest.mark.parametrize("size", [10, 100, 5000])
def test_largest_are_sorted_and_ties_go_by_index(count: int, size: int) -> None:
    values = np.random.default_rng(size).integers(0, 200, size).astype(np.float32)
    values[::7] = -np.inf
    expected = sorted(range(size), key=lambda i: (-values[i], i))[:count]
    assert largest(values, count).tolist() == expected


def test_drawn_tokens_follow_the_probabilities() -> None:
    values = logits(8, spread=1.0)
    sampler = Sampler(GenerationSettings(temperature=1.3, seed=7))
    n = 20_000
    counts = np.bincount([sampler.choose(values).token for _ in range(n)], minlength=8)
    p = softmax(values, 1.3)
    # Binomial standard deviation; chance passes 5 of them for one of 8 counts once in 200 000 runs; the seed is fixed.
    assert (np.abs(counts - n * p) < 5 * np.sqrt(n * p * (1 - p))).all()


def test_greedy_takes_the_likeliest_and_draws_nothing() -> None:
    for seed in (1, 2):
        assert Sampler(GenerationSettings()).choose(logits(100, seed)).token == logits(100, seed).argmax()


def test_top_k_of_one_is_greedy_at_any_temperature() -> None:
    values = logits(100)
    sampler = Sampler(GenerationSettings(temperature=5.0, top_k=1))
    assert {sampler.choose(values).token for _ in range(20)} == {int(values.argmax())}


def test_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    values = np.array([2.0, -2.0, 3.0, 0.5], np.float32)
    assert penalized(values, {0, 1}, 2.0).tolist() == [1.0, -4.0, 3.0, 0.5]
    assert values.tolist() == [2.0, -2.0, 3.0, 0.5]


def chosen(values: list[float], count: int, prompt: tuple[int, ...] = (), **settings: object) -> list[int]:
    sampler = Sampler(GenerationSettings(**settings), prompt)  # type: ignore[arg-type]
    return [sampler.choose(np.array(values, np.float32)).token for _ in range(count)]


def test_repetition_penalty_counts_the_prompt_and_each_new_token() -> None:
    assert chosen([4.0, 3.0, 2.9, 1.0], 3, (0,), repetition_penalty=2.0) == [1, 2, 0]


def test_presence_penalty_counts_the_answer_once_per_token() -> None:
    # 4 → 2.5 after its first use and no lower after its second; the prompt's tokens are free.
    assert chosen([4.0, 3.0, 2.4], 4, (0, 1), presence_penalty=1.5) == [0, 1, 0, 0]


def test_frequency_penalty_counts_every_use() -> None:
    # 4, then 3 against 3 (the lower id), then 2 against 3, then 2 against 2
    assert chosen([4.0, 3.0], 4, frequency_penalty=1.0) == [0, 0, 1, 0]


def test_a_bias_decides_and_does_not_change_the_logits() -> None:
    values = np.array([1.0, 2.0, 3.0], np.float32)
    sampler = Sampler(GenerationSettings(logit_bias={0: 100.0, 2: -100.0}))
    assert sampler.choose(values).token == 0
    assert values.tolist() == [1.0, 2.0, 3.0]


def test_told_logprobs_are_the_models_own() -> None:
    values = logits(50)
    settings = GenerationSettings(temperature=0.5, logprobs=3, logit_bias={7: 100.0})
    choice = Sampler(settings).choose(values)
    wanted = np.log(softmax(values, 1.0))
    assert choice.token == 7 and choice.logprob == pytest.approx(wanted[7], abs=1e-6)
    assert [token for token, _ in choice.top] == np.argsort(-values)[:3].tolist()
    assert [p for _, p in choice.top] == pytest.approx(wanted[[t for t, _ in choice.top]].tolist(), abs=1e-6)
    assert Sampler(GenerationSettings(logprobs=0)).choose(values).top == ()


class OnlyEven:
    """A mask that lets every second token through, and remembers what was taken."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def restrict(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.where(np.arange(len(values)) % 2 == 0, values, -np.inf).astype(np.float32)

    def accept(self, token: int) -> None:
        self.taken.append(token)

    def copy(self) -> OnlyEven:
        return self


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_mask_is_kept_to(temperature: float) -> None:
    mask = OnlyEven()
    sampler = Sampler(GenerationSettings(temperature=temperature), mask=mask)
    found = [sampler.choose(logits(20, seed)).token for seed in range(50)]
    assert mask.taken == found and all(token % 2 == 0 for token in found)


def test_huge_logits_and_tiny_temperatures_do_not_overflow() -> None:
    values = np.array([1e30, -1e30, 9e29], np.float32)
    assert Sampler(GenerationSettings(temperature=1e-6, top_p=0.9)).choose(values).token == 0


@pytest.mark.parametrize("size", [1, 255, 256, 257, 5000])
def test_a_draw_is_where_the_running_sum_passes_the_share(size: int) -> None:
    random = np.random.default_rng(size)
    weights = random.random(size, np.float32) * (random.random(size) < 0.7)
    weights[random.integers(size)] = 1
    reached = weights.cumsum(dtype=np.float64)
    for share in [0.0, 0.3, 0.999, *random.random(50)]:
        assert drawn(weights, share) == int(np.searchsorted(reached, share * reached[-1], side="right"))


def test_a_draw_at_the_very_end_is_of_a_token_that_weighs_something() -> None:
    weights = np.zeros(1000, np.float32)
    weights[[3, 700]] = 1, 2
    assert drawn(weights, 1 - 2**-53) == 700
