"""Qwen-VL: pictures of any size, several in a prompt; features, positions and answers are transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sight_toys import IMAGE, PREPARED, build_sight_model, dequantized, picture

from conftest import tuned
from roundexport import export
from roundexport.conversion.vision_language import check_sight
from roundexport.errors import ArtifactError, UsageError
from roundexport.formats.artifact import Artifact
from roundexport.formats.joined_package import join_packages
from roundexport.graph.grid_stages import grid_sizes
from roundexport.graph.parts import captures
from roundexport.model.checkpoint import Checkpoint
from roundexport.runtime import load
from roundexport.runtime.axis_positions import begun, positions, shift
from roundexport.runtime.engines._grid import GridEncoder
from roundexport.runtime.images import Area, read_preprocessor
from roundexport.runtime.picture_lists import PictureLists
from roundexport.runtime.seeing import SeeingDecoder
from roundexport.runtime.tiles import read_tiling
from roundexport.runtime.token_rows import TokenRows
from roundexport.targets.interface import load_target
from roundexport.targets.openvino.graph import Graph
from roundexport.targets.openvino.lowering import lower
from roundexport.targets.weight_source import WeightSource

TARGET = {"qwen2_5_vl": "openvino", "qwen3_vl": "onnx"}
EXACT = {"openvino": {}, "onnx": {"accuracy_level": 0}}  # so that onnxruntime-genai, too, computes in float32
PARTS = "text", "vision"
SHAPES = [(40, 60), (16, 16), (300, 50), (61, 33), (20, 20), (32, 48)]


@dataclass(frozen=True)
class Seer:
    """A toy and its package for one target."""

    family: str
    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def package(self) -> Path:
        return self.folder / "package"


@pytest.fixture(scope="module", params=list(TARGET))
def seer(request: pytest.FixtureRequest, shared: Callable[[str, Callable[[Path], object]], Path]) -> Seer:
    family = request.param

    def make(folder: Path) -> None:
        build_sight_model(folder / "model", family)
        for part in PARTS:
            made = folder / f"{part}-artifact"
            artifact = tuned(folder / "model", made, algorithm="rtn", bits=8, group_size=32, part=part)
            settings = {**EXACT[TARGET[family]], **({"inputs_embeds": True} if part == "text" else {})}
            export(artifact, folder / part, to=TARGET[family], settings=settings, progress=False)
        joined = load_target(TARGET[family]).joined
        join_packages(folder / "text", folder / "vision", folder / "package", check_sight, joined)

    return Seer(family, shared(family, make))


def _prepared(family: str, pictures: list[Any]) -> dict[str, Any]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = [Image.fromarray(one) for one in pictures]
    return dict(Qwen2VLImageProcessorPil(**PREPARED[family])(images=images, return_tensors="pt"))


@torch.no_grad()
def test_features_are_those_of_transformers(seer: Seer) -> None:
    """Also of pictures whose windows are cut off at the edges, and of one that is a single window."""
    import transformers

    model = Checkpoint.open(seer.model, part="vision").load_model()
    name = {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[seer.family]
    whole = getattr(transformers, f"{name}Model").from_pretrained(seer.model).eval()
    tiling = read_tiling(PREPARED[seer.family], "here")
    for shape in SHAPES:
        seen = picture(*shape)
        given = _prepared(seer.family, [seen])
        found = whole.visual(given["pixel_values"], grid_thw=given["image_grid_thw"])
        wanted = torch.cat([found.pooler_output, *getattr(found, "deepstack_features", [])], -1)
        pixels = torch.from_numpy(tiling(seen).pixels)
        own = model(pixel_values=pixels).last_hidden_state[0]
        assert (own - wanted).abs().max() < 1e-5 * wanted.std()


def test_answers_about_pictures_are_those_of_transformers(seer: Seer) -> None:
    opened = load(seer.package, precise=True)
    assert isinstance(opened, SeeingDecoder)
    model = dequantized(seer.model, *(seer.folder / f"{part}-artifact" for part in PARTS), family=seer.family)
    mark, image = f"<|vision_start|>{IMAGE[seer.family]}<|vision_end|>", model.config.image_token_id
    for shapes in ([(300, 50)], [(20, 20), (61, 33)]):
        pictures = [picture(*shape, seed) for seed, shape in enumerate(shapes)]
        ids = opened.encode(f"Look: {mark * len(pictures)} What is it?", pictures=pictures)
        given = _prepared(seer.family, pictures)
        plain = torch.tensor([[image if token >= opened.manifest.vocab_size else token for token in ids]])
        inputs = {"input_ids": plain, "attention_mask": torch.ones_like(plain), **given}
        inputs["mm_token_type_ids"] = (plain == image).int()
        assert int(inputs["mm_token_type_ids"].sum()) == int(given["image_grid_thw"].prod(1).sum()) // 4
        with torch.no_grad():
            wanted = model(**inputs).logits[0].numpy()
            answer = model.generate(**inputs, min_new_tokens=6, max_new_tokens=6, do_sample=False)[0, len(ids) :]
        spread = wanted.std()
        assert np.abs(opened.logits(np.array([ids]))[0] - wanted).max() < 1e-4 * spread
        assert opened.greedy([ids], 6)[0].tolist() == answer.tolist()
        with opened.start(rows=2) as session:  # in pieces, the second of which ends inside a picture, and once more
            (row,) = session.add()
            for begin, end in ((0, 7), (7, 12), (12, len(ids))):
                last = session.extend({row: ids[begin:end]})[0].copy()
            assert np.abs(last - wanted[-1]).max() < 1e-4 * spread
            other = session.fork(row, len(ids) - 2)
            session.cut(row, 9)
            both = session.extend({row: ids[9:], other: ids[-2:]})
            assert np.abs(both - wanted[-1]).max() < 1e-4 * spread


def test_onnxruntime_genai_answers_as_this_runtime_does(seer: Seer, tmp_path: Path) -> None:
    """Its processor, its positions and its loop, on two pictures of different sizes."""
    genai = pytest.importorskip("onnxruntime_genai")
    if TARGET[seer.family] != "onnx":
        pytest.skip("a package for OpenVINO")
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for number, (file, shape) in enumerate(zip(files, [(16, 24), (32, 48)], strict=True)):
        Image.fromarray(picture(*shape, number)).save(file)
    model = genai.Model(str(seer.package))
    text = f"Look: {f'<|vision_start|>{IMAGE[seer.family]}<|vision_end|>' * 2} What is it?"
    given = model.create_multimodal_processor()(text, images=genai.Images.open(*map(str, files)))
    opened = load(seer.package)
    assert isinstance(opened, SeeingDecoder)
    ids = opened.encode(text, pictures=files)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + 6, min_length=len(ids) + 6, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.set_inputs(given)
    logits = generator.get_logits()
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0)[len(ids) :].tolist() == opened.greedy([ids], 6)[0].tolist()
    assert np.abs(logits.reshape(-1) - opened.logits(np.array([ids]))[0, -1]).max() < 1e-3


def test_the_vendors_pipeline_answers_likewise(seer: Seer) -> None:
    """Of pictures that have their size already: openvino_genai resizes by another filter than Pillow."""
    genai, ov = pytest.importorskip("openvino_genai"), pytest.importorskip("openvino")
    if TARGET[seer.family] != "openvino":
        pytest.skip("a package for ONNX Runtime")
    opened = load(seer.package, precise=True)
    assert isinstance(opened, SeeingDecoder)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    pipeline = genai.VLMPipeline(str(seer.package), "CPU", **exact)
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample, config.apply_chat_template = 8, True, False, False
    mark = f"<|vision_start|>{IMAGE[seer.family]}<|vision_end|>"
    for shapes in ([(40, 56)], [(32, 48), (24, 16)]):  # several windows, cut off at edges; two pictures
        pictures = [picture(*shape, seed) for seed, shape in enumerate(shapes)]
        prompt = f"Look: {mark * len(pictures)} What is it?"
        images = [ov.Tensor(one[None]) for one in pictures]
        answer = pipeline.generate(prompt, images=images, generation_config=config)
        ids = opened.encode(prompt, pictures=pictures)
        assert answer.texts[0] == opened.tokenizer.decode(opened.greedy([ids], 8)[0].tolist())


def test_openvino_graphs_of_lists_give_what_the_tower_gives(seer: Seer) -> None:
    """Of a tower with a table of positions and DeepStack, for which the package here is ONNX Runtime's."""
    ov = pytest.importorskip("openvino")
    if TARGET[seer.family] == "openvino":
        pytest.skip("its package is made of them")
    checkpoint, artifact = Checkpoint.open(seer.model, part="vision"), Artifact.open(seer.folder / "vision-artifact")
    programs = captures(checkpoint, lists=True)
    precise = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = [
        ov.Core().compile_model(
            lower(Graph(one, WeightSource(artifact, checkpoint, one.transposed), "cpu")), "CPU", precise
        )
        for one in programs
    ]
    assert [one.stage for one in programs] == ["patches", "positions", "merger"]
    assert "deepstack_feature_lists" in compiled[-1].output(1).get_names()
    patches, positions, merger = (_Compiled(one) for one in compiled)
    sizes = PictureLists(**grid_sizes(programs[-1].config))
    encoder = GridEncoder(patches, positions, merger, sizes, angles=8)
    whole = dequantized(seer.model, seer.folder / "vision-artifact", family=seer.family).model
    tiling = read_tiling(PREPARED[seer.family], "here")
    for shape in SHAPES[:2]:
        given = _prepared(seer.family, [picture(*shape)])
        with torch.no_grad():
            wanted = whole.visual(given["pixel_values"], grid_thw=given["image_grid_thw"])
        both = torch.cat([wanted.pooler_output, *wanted.deepstack_features], -1).numpy()
        found = encoder.output({"pixel_values": tiling(picture(*shape)).pixels})[0]
        assert np.abs(found - both).max() < 1e-4 * both.std()


class _Compiled:
    """A compiled graph as an engine has it."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled

    def info(self) -> dict[str, Any]:
        return {}

    def output(self, inputs: Any, vector: bool = False) -> Any:
        return self._compiled(dict(inputs))[0]


def test_positions_are_those_of_transformers(seer: Seer) -> None:
    import transformers

    config = transformers.AutoConfig.from_pretrained(seer.model)
    name = {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[seer.family]
    with torch.device("meta"):
        model = getattr(transformers, f"{name}Model")(config)
    rows = TokenRows(lambda ids: np.zeros((*ids.shape, 4), np.float32), 100)
    grids = [(3, 2), (1, 4)]
    numbers = [rows.add(grid, np.zeros((grid[0] * grid[1], 4), np.float32), grid) for grid in grids]
    tokens = [1, 2, *numbers[0], 3, *numbers[1], *numbers[0], 4, 5]
    plain = torch.tensor([[99 if token >= 100 else token for token in tokens]])
    grid = torch.tensor([(1, 2 * high, 2 * wide) for high, wide in (*grids, grids[0])])
    separated = plain.clone()  # transformers tells pictures apart by what stands between them
    kinds = (separated == 99).int()
    kinds[0, 9 + 4 :][: len(numbers[0])] = 2
    wanted = model.get_rope_index(plain, kinds, grid[:2], grid[2:])[0][:, 0].numpy()
    for pieces in ([len(tokens)], [1, 4, 7, 3, 2, 4, 2]):
        places, past, found = [], 0, []
        for count in pieces:
            found.append(positions(rows, places, past, tokens[past : past + count]))
            past += count
        assert np.array_equal(np.concatenate(found, 1), wanted)
    assert shift(begun(places, 5), 40) == places[0].shift and begun(places, 2) == []
    assert len(places) == 3


def test_sizes_of_lists_are_read_strictly() -> None:
    right = {"patch": 4, "merge": 2, "frames": 2, "window": 2, "side": 0}
    assert PictureLists.read(right, "here").window == 2
    for wrong in (
        None,
        {},
        {**right, "patch": 0},
        {**right, "merge": 2.0},
        {**right, "more": 1},
        {**right, "side": -1},
    ):
        with pytest.raises(ArtifactError, match="here"):
            PictureLists.read(wrong, "here")


def test_sizes_of_pictures(seer: Seer) -> None:
    given = PREPARED[seer.family]
    area = read_preprocessor(given, "here").size
    assert area == Area(8, 256, 2304) and area.square == (48, 48)
    least = read_preprocessor({**given, "size": None, "min_pixels": 64, "max_pixels": 1 << 40}, "here").size
    assert isinstance(least, Area) and least.most == 1280 * 64
    with pytest.raises(UsageError, match="too long"):
        area.size(1000, 4)
    for wrong in ({"size": {"shortest_edge": 1, "longest_edge": 63}}, {"do_resize": False}, {"size": {}}):
        with pytest.raises(ArtifactError):
            read_preprocessor({**given, **wrong}, "here")
