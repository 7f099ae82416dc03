"""Pictures among the tokens: tiles, words and answers are transformers' own, on both targets and over HTTP."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from server_toys import running
from sight_toys import build_sight_model, dequantized, picture, processor

from roundexport import TuneSettings, export, inspect, tune
from roundexport.cli.printing import check_gates_held
from roundexport.conversion.asked_targets import Asked
from roundexport.conversion.settings import ConvertSettings
from roundexport.conversion.vision_language import convert_whole
from roundexport.errors import ArtifactError, GateError, UnsupportedError, UsageError, WrongOutputsError
from roundexport.formats.joined_package import join_packages
from roundexport.formats.package import read_package, vision_manifest, write_manifest
from roundexport.progress import Progress
from roundexport.runtime import GenerationSettings, generate, load
from roundexport.runtime.conversation import Conversation
from roundexport.runtime.seeing import SeeingDecoder
from roundexport.runtime.tiles import read_tiling
from roundexport.verification.gates import Gates
from roundexport.verification.sight import compare_sight

QUESTION = "What is it?"
SETTINGS = TuneSettings(algorithm="rtn", bits=8, group_size=32, part="all", precision="float32")


FAMILY = {"onnx": "smolvlm", "openvino": "idefics3"}


@dataclass(frozen=True)
class Sight:
    """Two toys of one form: SmolVLM's conversion for ONNX, and Idefics3's parts joined for OpenVINO."""

    folder: Path

    def model(self, target: str = "onnx") -> Path:
        return self.folder / FAMILY[target]

    def artifacts(self, target: str = "onnx") -> tuple[Path, Path]:
        if target == "openvino":
            return self.folder / "text-artifact", self.folder / "vision-artifact"
        return self.folder / "out" / "text" / "artifact", self.folder / "out" / "vision" / "artifact"

    def package(self, target: str) -> Path:
        return self.folder / "out" / target


def _make(folder: Path) -> None:
    sight = Sight(folder)
    for target, family in FAMILY.items():
        build_sight_model(sight.model(target), family)
    done = convert_whole(sight.model(), folder / "out", SETTINGS, ConvertSettings(Asked.of("onnx")), Progress(False))
    assert list(done.parts) == ["vision", "text"]
    assert 0 < (done.sights["onnx"].difference or 0) < 1e-4
    assert not any(report.failures for part in done.parts.values() for report in part.quality.values())
    for part, artifact in zip(("text", "vision"), sight.artifacts("openvino"), strict=True):
        tune(sight.model("openvino"), artifact, replace(SETTINGS, part=part), progress=False)
        more = {"inputs_embeds": True} if part == "text" else {}
        export(artifact, folder / part, to="openvino", settings=more, progress=False)
    join_packages(folder / "text", folder / "vision", sight.package("openvino"), lambda _: None)


@pytest.fixture(scope="session")
def sight(shared: Callable[[str, Callable[[Path], object]], Path]) -> Sight:
    return Sight(shared("sight", _make))


def _expected(sight: Sight, target: str, pictures: list[Any], count: int) -> tuple[str, list[int], list[int]]:
    """Prompt, its ids, and the greedy answer, of transformers."""
    read = processor(sight.model(target))
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": QUESTION}]
    text = read.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [[Image.fromarray(one) for one in pictures]]
    inputs = read(text=text, images=images, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        model = dequantized(sight.model(target), *sight.artifacts(target), family=FAMILY[target])
        found = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    ids = inputs["input_ids"][0].tolist()
    return text, ids, found[0, len(ids) :].tolist()


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_answers_about_pictures_are_those_of_transformers(target: str, sight: Sight) -> None:
    opened = load(sight.package(target), precise=True)
    assert isinstance(opened, SeeingDecoder)
    for shapes in ([(40, 60)], [(300, 50)], [(20, 20), (61, 33)]):
        pictures = [picture(*shape, seed) for seed, shape in enumerate(shapes)]
        _, ids, wanted = _expected(sight, target, pictures, 8)
        prompt = opened.encode(QUESTION, chat=True, pictures=pictures)
        image = json.loads((sight.model(target) / "config.json").read_text())["image_token_id"]
        limit = opened.manifest.vocab_size
        assert [image if token >= limit else token for token in prompt] == ids
        assert opened.greedy([prompt], 8)[0].tolist() == wanted
    assert opened.encode(QUESTION, chat=True, pictures=pictures) == prompt  # the same pictures have the same numbers


@pytest.mark.parametrize("shape", [(40, 60), (61, 33), (20, 20), (300, 50), (32, 32), (1, 90)])
@pytest.mark.parametrize("cut", [True, False])
def test_tiles_are_those_of_transformers(shape: tuple[int, int], cut: bool, sight: Sight) -> None:
    config = {**json.loads((sight.model() / "preprocessor_config.json").read_text()), "do_image_splitting": cut}
    read = processor(sight.model()).image_processor
    seen = picture(*shape)
    wanted = read([[Image.fromarray(seen)]], do_image_splitting=cut, return_row_col_info=True)
    found = read_tiling(config, "here")(seen)
    assert (found.rows, found.columns) == (wanted["rows"][0][0], wanted["cols"][0][0])
    assert np.array_equal(found.pixels, np.asarray(wanted["pixel_values"][0], np.float32))


def test_generate_answers_about_a_file(sight: Sight, tmp_path: Path) -> None:
    Image.fromarray(picture(40, 60)).save(tmp_path / "seen.png")
    one, other = (
        generate(
            sight.package("onnx"), QUESTION, chat=True, pictures=pictures, max_new_tokens=4, repetition_penalty=1.1
        )
        for pictures in ([tmp_path / "seen.png"], [])
    )
    assert one.prompt_tokens > other.prompt_tokens and one.tokens != other.tokens
    plain = generate(sight.package("onnx"), "<image>: ", pictures=[tmp_path / "seen.png"], max_new_tokens=4)
    assert len(plain.tokens) == 4
    with pytest.raises(UsageError, match="2 image tokens"):
        generate(sight.package("onnx"), "<image><image>", pictures=[tmp_path / "seen.png"])
    with pytest.raises(UnsupportedError, match="reads text, not pictures"):
        generate(sight.folder / "out" / "text" / "onnx", QUESTION, pictures=[tmp_path / "seen.png"])


def test_a_conversation_goes_on_about_its_picture(sight: Sight) -> None:
    opened = load(sight.package("onnx"))
    assert isinstance(opened, SeeingDecoder)
    settings = GenerationSettings(max_new_tokens=3, ignore_eos=True)
    talk = Conversation(opened)
    first = "".join(talk.ask(QUESTION, settings, [picture(40, 60)]))
    "".join(talk.ask("And now?", settings))
    assert talk.turns[1].counts.reused >= talk.turns[0].prompt_tokens
    again = Conversation(opened)
    assert "".join(again.ask(QUESTION, settings, [picture(40, 60)])) == first
    json.dumps(talk.messages)
    for one in (talk, again):
        one.close()


def _url(seen: Any, kind: str = "png") -> str:
    file = io.BytesIO()
    Image.fromarray(seen).save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def test_a_server_reads_pictures_out_of_requests_only(sight: Sight) -> None:
    def body(*urls: str) -> dict[str, Any]:
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content = [*parts, {"type": "text", "text": QUESTION}]
        return {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}

    with running([sight.package("onnx")], max_pictures=2) as server:
        answers = [server.post("chat/completions", body(_url(picture(40, 60, seed)))).json() for seed in (0, 1, 0)]
        texts = [answer["choices"][0]["message"]["content"] for answer in answers]
        assert texts[0] == texts[2] != texts[1]
        assert answers[2]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        for url, why in (
            ("http://example.org/a.png", "nothing is fetched"),
            ("file:///etc/passwd", "nothing is fetched"),
            ("data:image/png;base64,!!!", "not base64"),
            ("data:image/png;base64,aGVsbG8=", "cannot be read"),
        ):
            refused = server.post("chat/completions", body(url))
            assert refused.status_code == 400 and why in refused.json()["error"]["message"]
        many = server.post("chat/completions", body(*[_url(picture(8, 8))] * 3))
        assert many.status_code == 400 and "may have 2 pictures" in many.json()["error"]["message"]
        literal = {"messages": [{"role": "user", "content": "<image>"}], "max_tokens": 4}
        assert server.post("chat/completions", literal).status_code == 400
    photo, small = body(_url(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))), 10_000
    assert len(json.dumps(photo)) > small
    with running([sight.package("onnx")], max_body=small, picture_body=3 * small, max_pictures=1) as server:
        assert server.post("chat/completions", photo).status_code == 200
    with running([sight.folder / "out" / "text" / "onnx"], max_body=small) as server:
        assert server.post("chat/completions", photo).status_code == 413
        refused = server.post("chat/completions", body(_url(picture(8, 8))))
        assert refused.status_code == 400 and "reads text, not 'image_url'" in refused.json()["error"]["message"]


def test_a_package_with_other_weights_than_the_whole_model_is_refused(sight: Sight) -> None:
    with pytest.raises(WrongOutputsError, match="though its parts are right"):
        compare_sight(sight.package("onnx"), sight.model(), ())  # 8 bits beside float weights


def test_inspect_tells_of_both_parts(sight: Sight) -> None:
    found = inspect(sight.package("onnx"))
    assert found.facts["pictures"].startswith("read by vision_encoder.onnx: 6 layers")
    assert len(found.rows) == found.facts["layers"] + 6
    assert 0 < read_package(sight.package("onnx")).settings["sight"]["difference"] < 1e-4


def test_parts_that_do_not_belong_together_are_not_joined(sight: Sight, tmp_path: Path) -> None:
    text, vision = (sight.folder / "out" / part / "onnx" for part in ("text", "vision"))
    shutil.copytree(text, tmp_path / "whole")
    manifest = read_package(text)
    write_manifest(tmp_path / "whole", replace(manifest, settings={**manifest.settings, "inputs_embeds": False}))
    for one, other, why in (
        (tmp_path / "whole", vision, "reads token ids"),
        (text, text, "not the image side"),
        (text, sight.folder / "vision", "not the image side"),
    ):
        with pytest.raises(UsageError, match=why):
            join_packages(one, other, tmp_path / "out", lambda _: None)


def test_a_joined_manifest_is_read_strictly(sight: Sight, tmp_path: Path) -> None:
    shutil.copytree(sight.package("onnx"), tmp_path / "package")
    manifest = read_package(tmp_path / "package")
    assert (own := vision_manifest(manifest)) is not None and own.task == "embed_image" and own.layers
    manifest.settings["vision"]["model_file"] = "elsewhere.onnx"
    write_manifest(tmp_path / "package", manifest)
    with pytest.raises(ArtifactError, match=r"settings\.vision"):
        load(tmp_path / "package")


def test_a_model_whose_pictures_are_not_read_is_refused_before_any_work(sight: Sight, tmp_path: Path) -> None:
    shutil.copytree(sight.model(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    with pytest.raises(UnsupportedError, match=r"preprocessor_config\.json"):
        convert_whole(tmp_path / "model", tmp_path / "out", SETTINGS, ConvertSettings(), Progress(False))
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "model_type": "gemma3"}))
    with pytest.raises(UnsupportedError, match="pictures are not put into prompts of gemma3"):
        convert_whole(tmp_path / "model", tmp_path / "out", SETTINGS, ConvertSettings(), Progress(False))
    assert not (tmp_path / "out").exists()


def test_a_finished_conversion_of_both_parts_is_not_handed_out_again(sight: Sight, tmp_path: Path) -> None:
    shutil.copytree(sight.folder / "out", tmp_path / "out")
    wanted, made = ConvertSettings(Asked.of("onnx")), tmp_path / "out"
    with pytest.raises(UsageError, match="finished conversion"):
        convert_whole(sight.model(), made, SETTINGS, wanted, Progress(False))
    with pytest.raises(UsageError, match="was begun with bits 8"):
        convert_whole(sight.model(), made, replace(SETTINGS, bits=4), wanted, Progress(False))
    (made / "quality.json").unlink()  # as if it had been stopped before its end
    strict = replace(wanted, gates=Gates(max_kl=0.0))
    done = convert_whole(sight.model(), made, SETTINGS, strict, Progress(False))  # both parts lie there finished
    with pytest.raises(GateError, match="max-kl"):
        check_gates_held(done)
    (made / "request.json").unlink()
    with pytest.raises(UsageError, match="is no conversion"):
        convert_whole(sight.model(), made, SETTINGS, wanted, Progress(False))
