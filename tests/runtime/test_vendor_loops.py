"""The vendors' own loops on our packages: the same greedy tokens as ours, and no silence about what they lack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from roundexport.errors import UnsupportedError
from roundexport.runtime import Decoder, GenerationSettings, load
from roundexport.runtime.settings import Grammar

VENDORS = {"onnx": "onnxruntime-genai", "openvino": "openvino-genai"}


@pytest.fixture(scope="module", params=VENDORS)
def pair(request: pytest.FixtureRequest, packages: Callable[[str, str], tuple[Path, Path]]) -> tuple[Decoder, Decoder]:
    """Our loop and the vendor's, on one package of the sample model."""
    pytest.importorskip(VENDORS[request.param].replace("-", "_"))
    folder = packages("sample", request.param)[1]
    ours, theirs = load(folder, threads=1), load(folder, engine=VENDORS[request.param], threads=1)
    assert isinstance(ours, Decoder) and isinstance(theirs, Decoder)
    return ours, theirs


@pytest.mark.parametrize("text", ["The sea was", "He looked at her", "In the year", "They had"])
def test_greedy_text_is_ours(pair: tuple[Decoder, Decoder], text: str) -> None:
    ours, theirs = pair
    settings = GenerationSettings(max_new_tokens=24, stop=("\n\n",))
    written = [[step for step in decoder.generate([text], settings)] for decoder in pair]
    assert [s.tokens for s in written[0]] == [s.tokens for s in written[1]]
    assert "".join(s.text[0] for s in written[0]) == "".join(s.text[0] for s in written[1])
    assert written[0][-1].finished == written[1][-1].finished is not None
    prompt = ours.encode(text)
    assert theirs.greedy([prompt], 24)[0].shape == (24,)


def test_sampling_repeats_with_its_seed(pair: tuple[Decoder, Decoder]) -> None:
    def tokens(seed: int) -> list[tuple[int | None, ...]]:
        settings = GenerationSettings(max_new_tokens=16, temperature=1.0, seed=seed, ignore_eos=True)
        return [step.tokens for step in pair[1].generate(["The sea"], settings)]

    assert tokens(1) == tokens(1) != tokens(2)


def test_a_stream_may_be_left_and_another_begun(pair: tuple[Decoder, Decoder]) -> None:
    steps = pair[1].generate(["The sea"], GenerationSettings(max_new_tokens=200, ignore_eos=True))
    first = [next(steps), next(steps)]
    steps.close()  # type: ignore[attr-defined]
    again = pair[1].generate(["The sea"], GenerationSettings(max_new_tokens=2, ignore_eos=True))
    assert [s.tokens for s in again] == [s.tokens for s in first]


@pytest.mark.parametrize(
    "settings", [GenerationSettings(logit_bias={5: 1.0}), GenerationSettings(grammar=Grammar("regex", "a+"))], ids=str
)
def test_what_a_loop_lacks_is_refused_by_name(pair: tuple[Decoder, Decoder], settings: GenerationSettings) -> None:
    name = "logit_bias" if settings.logit_bias else "grammar"
    with pytest.raises(UnsupportedError, match=f"has no {name}; open the package with engine auto"):
        next(iter(pair[1].generate(["The sea"], settings)))


def test_a_loop_has_no_sessions_and_no_second_prompt(pair: tuple[Decoder, Decoder]) -> None:
    with pytest.raises(UnsupportedError, match="gives tokens and no logits"):
        pair[1].start()
    with pytest.raises(UnsupportedError, match="one prompt at a time"):
        pair[1].generate(["One", "Two"])


def test_float32_throughout_is_not_what_a_loop_runs(packages: Callable[[str, str], tuple[Path, Path]]) -> None:
    pytest.importorskip("onnxruntime_genai")
    with pytest.raises(UnsupportedError, match="runs packages as they ship"):
        load(packages("sample", "onnx")[1], engine="onnxruntime-genai", precise=True)
