"""Pictures are prepared as transformers' processors for Pillow prepare them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from roundexport.errors import ArtifactError, UnsupportedError, UsageError
from roundexport.runtime.images import Preprocessor, pictures_in, read_preprocessor

MEAN, DEVIATION = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    ("ViTImageProcessor", {"size": {"height": 20, "width": 28}}),
    ("SiglipImageProcessor", {"size": {"height": 24, "width": 24}, "resample": 3}),
    ("CLIPImageProcessor", {"size": {"shortest_edge": 22}, "crop_size": {"height": 20, "width": 20}, "resample": 3,
                            "do_center_crop": True}),
    ("CLIPImageProcessor", {"size": {"shortest_edge": 22}, "crop_size": {"height": 40, "width": 30},
                            "do_center_crop": True, "resample": 2}),
    ("BitImageProcessor", {"size": {"shortest_edge": 22}, "crop_size": {"height": 17, "width": 15}, "resample": 3,
                           "do_center_crop": True}),
    ("ViTImageProcessor", {"size": {"height": 20, "width": 20}, "do_normalize": False, "resample": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("processor", "values"), PROCESSORS)
def test_pixels_are_those_of_transformers(processor: str, values: dict[str, Any]) -> None:
    pytest.importorskip("PIL")
    import transformers

    given = {"image_mean": MEAN, "image_std": DEVIATION, **values}
    theirs = getattr(transformers, f"{processor}Pil")(**given)
    ours = read_preprocessor(given, "preprocessor_config.json")
    generator = np.random.default_rng(0)
    for height, width in ((31, 47), (47, 31), (20, 20)):
        picture = generator.integers(0, 256, (height, width, 3), np.uint8)
        wanted = theirs(picture, return_tensors="np")["pixel_values"][0]
        found = ours(picture)
        assert found.dtype == np.float32 and found.shape == wanted.shape
        assert np.abs(found - wanted).max() < 1e-5


def test_files_and_pillow_images_are_arrays_of_bytes(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    ours = Preprocessor((8, 8), None, 2, 1 / 255, (0.5,) * 3, (0.5,) * 3)
    array = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    opened = image.fromarray(array)
    opened.save(tmp_path / "b.png")
    image.fromarray(array[..., 0]).save(tmp_path / "a.png")
    assert [path.name for path in pictures_in(tmp_path)] == ["a.png", "b.png"]
    assert np.array_equal(ours(tmp_path / "b.png"), ours(array)) and np.array_equal(ours(opened), ours(array))
    assert np.array_equal(ours(tmp_path / "a.png")[0], ours(tmp_path / "a.png")[2])


def test_what_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    plain = {"size": 8, "image_mean": MEAN, "image_std": DEVIATION}
    assert read_preprocessor(plain, "here").shape == (8, 8)
    for changed, error, words in (
        ({"image_mean": None}, ArtifactError, "here: a value makes no sense"),
        ({"size": {"shortest_edge": 4, "longest_edge": 9}}, ArtifactError, "pictures of any size"),
        ({"size": {"height": 0, "width": 3}}, ArtifactError, "a size of"),
        ({"do_image_splitting": True}, UnsupportedError, "cut into tiles"),
    ):
        with pytest.raises(error, match=words):
            read_preprocessor({**plain, **changed}, "here")
    with pytest.raises(ArtifactError, match="'size' is missing"):
        read_preprocessor({}, "here")
    with pytest.raises(UsageError, match="holds no pictures"):
        pictures_in(tmp_path)
