"""Encoders of images on both runtimes: outputs are transformers', pictures are prepared as it prepares them."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_tools import spread_weights

from conftest import tuned
from roundexport import TuneSettings, convert, export, verify
from roundexport.cli.classifying import classify
from roundexport.errors import UnsupportedError, UsageError
from roundexport.formats.package import read_package
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.output_head import output_tensor
from roundexport.reports.model_card import _TASKS
from roundexport.runtime import ImageClassifier, ImageEncoder, load
from roundexport.types import Task

SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
WIDE = {**SIZES, "intermediate_size": 128}
PREPARED = {
    "do_resize": True, "size": {"height": 32, "width": 32}, "resample": 2, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.3],
    "image_processor_type": "ViTImageProcessor",
}  # fmt: skip
# name -> (class in transformers, its config's, config values, what the preprocessor says otherwise)
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "vit": ("ViTModel", "ViTConfig", WIDE, {}),
    "vit, labels": ("ViTForImageClassification", "ViTConfig", {**WIDE, "num_labels": 5}, {}),
    "dino": ("Dinov2Model", "Dinov2Config", {**SIZES, "mlp_ratio": 2},
             {"size": {"shortest_edge": 26}, "do_center_crop": True, "crop_size": {"height": 24, "width": 24},
              "image_processor_type": "BitImageProcessor", "resample": 3}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", WIDE, {}),
    "clip": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**WIDE, "projection_dim": 48}, {}),
}  # fmt: skip
ON_BOTH = ("vit",)  # the others take turns
RUNS = [(name, target) for number, name in enumerate(MODELS) for place, target in enumerate(("onnx", "openvino"))
        if name in ON_BOTH or number % 2 != place]  # fmt: skip


@pytest.fixture(scope="session")
def seeing(shared: Callable[[str, Callable[[Path], object]], Path]) -> Callable[[str], Path]:
    """``seeing("vit")`` is a tiny random encoder of images, made once a session."""

    def make(name: str, folder: Path) -> None:
        import transformers

        kind, config, values, prepared = MODELS[name]
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, config)(**values)).eval()
        spread_weights(model)
        model.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps({**PREPARED, **prepared}))

    return lambda name: shared(f"image-{name}", lambda folder: make(name, folder))


@pytest.fixture(scope="session")
def packaged(
    seeing: Callable[[str], Path], shared: Callable[[str, Callable[[Path], object]], Path]
) -> Callable[[str, str], Path]:
    """``packaged("vit", "onnx")``: the float package, made once a session."""

    def get(name: str, target: str) -> Path:
        return shared(f"image-{name}-{target}", lambda out: export(seeing(name), out, to=target, progress=False))

    return get


def pictures(count: int = 3) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (40 + 9 * n, 61 - 7 * n, 3), np.uint8) for n in range(count)]


@pytest.mark.parametrize(("name", "target"), RUNS)
def test_outputs_are_those_of_transformers(
    name: str, target: str, seeing: Callable[[str], Path], packaged: Callable[[str, str], Path]
) -> None:
    model = Checkpoint.open(seeing(name)).load_model()
    package = load(packaged(name, target), precise=True)
    assert isinstance(package, ImageEncoder | ImageClassifier)
    pixels = package.pixels(pictures()) if "size" in PREPARED else np.zeros(0)
    assert pixels.shape == (3, 3, *((24, 24) if name == "dino" else (32, 32)))
    with torch.no_grad():
        expected = model(pixel_values=torch.from_numpy(pixels))
    usual = output_tensor(expected).numpy()
    found = package.logits(pixels) if isinstance(package, ImageClassifier) else package.hidden(pixels, 2)
    assert found.shape == usual.shape and usual.std() > 0.1
    assert np.abs(found - usual).max() < 1e-4 * usual.std()
    if isinstance(package, ImageEncoder):
        vectors = output_tensor(expected, vector=True).numpy()
        assert np.abs(package.embed_pixels(pixels) - vectors).max() < 1e-4 * max(1, vectors.std())


def test_a_pooler_that_the_file_lacks_is_not_made_up(seeing: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((seeing("vit") / name).read_bytes())
    kept = {k: v for k, v in load_file(seeing("vit") / "model.safetensors").items() if "pooler" not in k}
    save_file(kept, tmp_path / "model.safetensors")
    export(tmp_path, tmp_path / "package", progress=False)
    package = load(tmp_path / "package", precise=True)
    assert isinstance(package, ImageEncoder) and package.manifest.pooling == {"mode": "cls", "normalize": False}
    pixels = package.pixels(pictures(1))
    assert np.array_equal(package.embed_pixels(pixels), package.hidden(pixels)[:, 0])


@pytest.mark.parametrize("algorithm", ["rtn", "gram"])
def test_tuned_and_verified(
    algorithm: str, seeing: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = tuned(seeing("vit"), tmp_path / "artifact", algorithm=algorithm, group_size=32, num_samples=8,
                     progress=True)  # fmt: skip
    assert ("drawn ones" in capsys.readouterr().err) == (algorithm == "gram")
    export(artifact, tmp_path / "package", progress=False)
    report = verify(tmp_path / "package", against=seeing("vit"), artifact=artifact, num_samples=8, min_cosine=0.9,
                    progress=False)  # fmt: skip
    quality: Any = report.quality
    assert report.integers_checked and report.text.startswith("pictures drawn here")
    assert 0.9 < quality.cosine.mean < 1 and not report.failures


def test_what_is_not_a_picture_is_refused(packaged: Callable[[str, str], Path], tmp_path: Path) -> None:
    package = load(packaged("vit, labels", "openvino"))
    assert isinstance(package, ImageClassifier)
    (label,) = package.classify(pictures(1))
    assert label.score == max(label.scores.values()) and len(label.scores) == 5
    with pytest.raises(UsageError, match=r"\[height, width, 3\] of uint8, not \[3, 4\] of float64"):
        package.classify([np.zeros((3, 4))])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="put a single one into a list"):
        package.classify("cat.png")
    with pytest.raises(UsageError, match=r"pixels are \[images, channels, height, width\], not \[3, 32, 32\]"):
        package.logits(np.zeros((3, 32, 32), np.float32))
    (tmp_path / "cat.png").write_bytes(b"text")
    pytest.importorskip("PIL")
    with pytest.raises(UsageError, match=r"cat\.png cannot be read as a picture"):
        package.classify([tmp_path / "cat.png"])


def test_the_best_recipe_is_refused_before_any_work(seeing: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"fisher_samples is for models of text.*take --recipe default"):
        tuned(seeing("vit"), tmp_path / "artifact", algorithm=None, recipe="best")
    with pytest.raises(UnsupportedError, match="finish end_to_end tunes models of text as a whole"):
        tuned(seeing("vit"), tmp_path / "artifact", finish="end_to_end")


@pytest.mark.parametrize(("family", "target"), [("CLIP", "onnx"), ("Siglip", "openvino")])
def test_of_two_towers_the_image_encoder_is_taken(family: str, target: str, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    text = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 16}  # fmt: skip
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=WIDE, projection_dim=48)
    whole = getattr(transformers, f"{family}Model")(config).eval()
    spread_weights(whole)
    whole.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(PREPARED))
    report = export(tmp_path / "model", tmp_path / "package", to=target, progress=False)
    assert any("--part vision" in note for note in report.notes)
    package = load(tmp_path / "package", precise=True)
    assert isinstance(package, ImageEncoder)
    pixels = package.pixels(pictures())
    with torch.no_grad():
        features = whole.get_image_features(pixel_values=torch.from_numpy(pixels))
    wanted = (features if isinstance(features, torch.Tensor) else features.pooler_output).numpy()
    assert np.abs(package.embed_pixels(pixels) - wanted).max() < 1e-4 * wanted.std()
    with pytest.raises(UnsupportedError, match="of this model the part vision is exported, not text"):
        Checkpoint.open(tmp_path / "model", part="text")


def test_a_folder_of_pictures_is_converted_and_classified(
    seeing: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "pictures").mkdir()
    for number, picture in enumerate(pictures()):
        image.fromarray(picture).save(tmp_path / "pictures" / f"{number}.png")
    settings = TuneSettings(recipe="light", group_size=32, num_samples=4, calibration=str(tmp_path / "pictures"))
    done = convert(seeing("vit, labels"), tmp_path / "out", settings, to="onnx", progress=False)
    assert done.exports["onnx"].outputs
    assert "pipeline_tag: image-classification" in (tmp_path / "out/onnx/README.md").read_text()
    assert read_package(tmp_path / "out/onnx").source["calibration"]["num_samples"] == 3
    with pytest.raises(UsageError, match=r"calibrated on 0\.png, 1\.png, 2\.png of these pictures"):
        verify(tmp_path / "out/onnx", against=seeing("vit, labels"), text=tmp_path / "pictures", progress=False)
    classify(tmp_path / "out/onnx", [str(tmp_path / "pictures/0.png")], json=True)
    (found,) = json.loads(capsys.readouterr().out)
    assert found["picture"].endswith("0.png") and found["label"] in found["scores"]


def test_every_task_has_its_words() -> None:
    assert set(_TASKS) == set(typing.get_args(Task))
