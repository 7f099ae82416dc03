"""The vendors' own loops on our packages: the same greedy tokens as ours, and no silence about what they lack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from roundexport.errors import RoundexportError, UnsupportedError
from roundexport.formats.package import read_package
from roundexport.quant.spec import QuantSpec
from roundexport.runtime import Decoder, GenerationSettings, load
from roundexport.runtime.settings import Grammar
from roundexport.runtime.types import EngineOptions
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


@pytest.mark.parametrize("precise", [False, True])
def test_what_a_graph_asks_for_is_not_overruled(precise: bool) -> None:
    """What is said to a vendor's pipeline is what the graph comes to where nothing is said."""
    ov = pytest.importorskip("openvino")
    from roundexport.runtime.engines._ov_properties import PRECISIONS, plain, properties, stated

    x = ov.opset13.parameter([1, 4], name="x")
    model, core = ov.Model([ov.opset13.relu(x)], [x]), ov.Core()
    wanted = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 64, "KV_CACHE_PRECISION": "f16"}  # neither is the plugin's own
    for name, value in wanted.items():
        model.set_rt_info(str(value), ["runtime_options", name])
    options = EngineOptions(precise=precise)
    said = stated(core, "CPU", options, model)
    compiled = core.compile_model(model, "CPU", properties(core, "CPU", options))
    assert {name: said[name] for name in PRECISIONS.values()} == {
        name: plain(compiled.get_property(name)) for name in PRECISIONS.values()
    }
    assert (wanted.items() <= said.items()) == (not precise)


@pytest.mark.parametrize("engine", ["openvino-genai", "openvino-genai-batching"])
def test_two_bits_are_written(engine: str, two_bits: Path) -> None:
    """Their products have no kernel with quantized activations on bfloat16 machines, as the package says itself."""
    theirs = load(two_bits, engine=engine, threads=1)
    assert isinstance(theirs, Decoder)
    assert theirs.info()["precision"]["dynamic_quantization_group_size"] == 0
    assert theirs.greedy([[5, 6, 7]], 3)[0].shape == (3,)


@pytest.fixture(scope="module")
def two_bits(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("openvino_genai")
    from openvino_tools import Package

    folder = tmp_path_factory.mktemp("two-bits")
    return Package(models("qwen3, one block"), folder, lambda info: QuantSpec(2, 32, True)).folder


class Short:
    """A loop that ends before it was told to."""

    def info(self) -> dict[str, Any]:
        return {"engine": "short"}

    def write(self, prompt: object, settings: GenerationSettings) -> Iterator[int]:
        return iter(range(settings.max_new_tokens - 1))

    def together(self, prompts: list[object], settings: GenerationSettings) -> Iterator[tuple[int, int]]:
        return ((place, token) for place in range(len(prompts)) for token in range(settings.max_new_tokens - place))


def test_a_loop_that_ends_early_is_no_measurement(toy: Callable[[str], Path]) -> None:
    manifest = read_package(toy("ov"))
    decoder = LoopDecoder(Short(), manifest, toy("ov"))
    with pytest.raises(RoundexportError, match="engine short wrote 3 of 4 tokens of prompt 1 of 1"):
        decoder.timed([[5, 6]], 4)
    with pytest.raises(RoundexportError, match="engine short wrote 3 of 4 tokens of prompt 2 of 2"):
        decoder.greedy([[5, 6], [7]], 4)
