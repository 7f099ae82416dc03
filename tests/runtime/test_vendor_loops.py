"""The vendors' own loops on our packages: the same greedy tokens as ours, and no silence about what they lack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from roundexport.errors import UnsupportedError
from roundexport.runtime import Decoder, GenerationSettings, load
from roundexport.runtime.settings import Grammar
from roundexport.runtime.vendor_loop import LoopDecoder

VENDORS = {"onnxruntime-genai": "onnx", "openvino-genai": "openvino", "openvino-genai-batching": "openvino"}


@pytest.fixture(scope="module", params=VENDORS)
def pair(request: pytest.FixtureRequest, packages: Callable[[str, str], tuple[Path, Path]]) -> tuple[Decoder, Decoder]:
    """Our loop and the vendor's, on one package of the sample model."""
    pytest.importorskip(request.param.removesuffix("-batching").replace("-", "_"))
    folder = packages("sample", VENDORS[request.param])[1]
    ours, theirs = load(folder, threads=1), load(folder, engine=request.param, threads=1)
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


def test_precisions_are_said(pair: tuple[Decoder, Decoder]) -> None:
    """Those of the vendor's loop are those that the same library has in ours."""
    ours, theirs = (decoder.info() for decoder in pair)
    assert theirs["precision"] == ours["precision"]
    assert not any("choice" in str(value) for value in theirs["precision"].values())


def test_several_prompts_take_as_long_as_the_slowest(pair: tuple[Decoder, Decoder]) -> None:
    """Token times of answers written together are when all of them had the token."""
    theirs = pair[1]
    assert isinstance(theirs, LoopDecoder)
    prompts = [theirs.encode("The sea"), theirs.encode("He looked at her. " * 40)]
    if not theirs.info()["engine"].endswith("batching"):
        with pytest.raises(UnsupportedError, match="one prompt at a time"):
            theirs.timed(prompts, 4)
        return
    tokens, times = theirs.timed(prompts, 4)
    assert tokens == [found.tolist() for prompt in prompts for found in theirs.greedy([prompt], 4)]
    assert len(times) == 4 and times == sorted(times) and times[0] > 0
