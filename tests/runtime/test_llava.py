"""LLaVA: hidden states of an earlier layer; answers are transformers', and those of openvino_genai's own pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from sight_toys import build_sight_model, dequantized, picture, processor

from conftest import tuned
from roundexport import export
from roundexport.conversion.vision_language import check_sight
from roundexport.formats.joined_package import join_packages
from roundexport.runtime import load
from roundexport.runtime.seeing import SeeingDecoder
from roundexport.verification.sight import compare_sight

PARTS = "text", "vision"


def _make(folder: Path) -> None:
    build_sight_model(folder / "model", "llava")
    for part in PARTS:
        artifact = tuned(
            folder / "model", folder / f"{part}-artifact", algorithm="rtn", bits=8, group_size=32, part=part
        )
        settings = {"inputs_embeds": True} if part == "text" else {}
        export(artifact, folder / part, to="openvino", settings=settings, progress=False)
    join_packages(folder / "text", folder / "vision", folder / "package", check_sight)


@pytest.fixture(scope="module")
def llava(shared: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    return shared("llava", _make)


def test_answers_about_pictures_are_those_of_transformers(llava: Path) -> None:
    opened = load(llava / "package", precise=True)
    assert isinstance(opened, SeeingDecoder)
    model = dequantized(llava / "model", *(llava / f"{part}-artifact" for part in PARTS), family="llava")
    sight = compare_sight(llava / "package", llava / "model", [llava / f"{part}-artifact" for part in PARTS])
    assert 0 < (sight.difference or 0) < 1e-4
    read, text = processor(llava / "model", "llava"), "<image>\nWhat is it?"
    for shape in ((40, 60), (300, 50)):
        seen = picture(*shape)
        inputs = read(text=text, images=[Image.fromarray(seen)], return_tensors="pt")
        with torch.no_grad():
            found = model.generate(**inputs, min_new_tokens=8, max_new_tokens=8, do_sample=False)
        ids = opened.encode(text, pictures=[seen])
        assert len(ids) == inputs["input_ids"].shape[1]
        wanted = found[0, len(ids) :].tolist()
        given = opened.greedy([ids], 8)[0].tolist()
        upto = given.index(0) if 0 in given else 8  # transformers was told not to end there
        assert given[:upto] == wanted[:upto] and upto > 0


def test_the_vendors_pipeline_answers_likewise(llava: Path) -> None:
    """Of a picture that is a tile already: openvino_genai resizes by another filter than Pillow."""
    genai, ov = pytest.importorskip("openvino_genai"), pytest.importorskip("openvino")
    opened, seen = load(llava / "package", precise=True), picture(32, 32)
    assert isinstance(opened, SeeingDecoder)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    pipeline = genai.VLMPipeline(str(llava / "package"), "CPU", **exact)
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample, config.apply_chat_template = 8, True, False, False
    answer = pipeline.generate("<image>What is it?", images=[ov.Tensor(seen[None])], generation_config=config)
    ids = opened.encode("<image>\nWhat is it?", pictures=[seen])  # which the pipeline makes of it
    assert answer.texts[0] == opened.tokenizer.decode(opened.greedy([ids], 8)[0].tolist())
