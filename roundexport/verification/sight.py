"""A joined package beside transformers' whole model with the same integers, on a picture, before it is kept.

    picture ─ tiles ─┬─ package                                                          ─▶ logits behind every token
                     └─ transformers' whole model, weights of both artifacts dequantized ─▶ logits

Each part was held against its own model when it was exported.  What is between them is seen here: where features stand
in a prompt, positions of several axes, features that are added behind blocks.

    difference = max |package - model| / std(model)         refused beyond TOLERANCE: two float32 computations, one
                                                            after the other; a feature in a wrong place gives 1

Limits: the whole model is in memory in float32; where that is more than half of what is free, nothing is compared, and
that is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from roundexport.calibration.images import dead_leaves
from roundexport.environment.memory import MemoryLimit
from roundexport.errors import UnsupportedError, WrongOutputsError
from roundexport.formats.artifact import Artifact
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.parts import PARTS
from roundexport.model.transformers_loading import read_whole_model

if TYPE_CHECKING:
    from roundexport.runtime.tiles import Tiles

TOLERANCE = 1e-2
_SHAPE = 96, 128
_LANGUAGE = ("language_model", "text_model")


@dataclass(frozen=True)
class Sight:
    """How far a joined package's logits are from the whole model's.

    Args:
        difference: the largest, relative to the standard deviation of the model's logits; None: nothing was compared.
        tokens: of the prompt, a picture's among them.
        why: nothing was compared, where that is so.
    """

    difference: float | None
    tokens: int
    why: str = ""

    def __str__(self) -> str:
        if self.difference is None:
            return f"its answer about a picture was not compared with the whole model's: {self.why}"
        return (
            f"about a picture its logits are within {self.difference:.1e} standard deviations of the whole dequantized "
            f"model ({self.tokens} tokens)"
        )


def compare_sight(package: Path, model: Path, artifacts: Iterable[Path], max_ram: float | None = None) -> Sight:
    """Hold a joined package against the whole model.

    Args:
        package: the package.
        model: the float model's folder.
        artifacts: of its parts.
        max_ram: GiB of memory to stay within; where the whole model does not fit, it is not compared.

    Raises:
        WrongOutputsError: they differ.
    """
    import torch

    from roundexport.runtime.loading import load
    from roundexport.runtime.seeing import SeeingDecoder

    opened = load(package, check_hashes=False, precise=True)
    assert isinstance(opened, SeeingDecoder), "a joined package reads pictures"
    picture = dead_leaves(*_SHAPE, np.random.default_rng(0))
    numbers = opened.encode("?", pictures=[picture])
    size, free = 4 * _values(model), MemoryLimit(max_ram).left()
    if size > free / 2:
        return Sight(None, len(numbers), f"it takes {size / 2**30:.1f} GiB in float32, and {free / 2**30:.1f} are free")
    whole = read_whole_model(model)
    _overwrite(whole, artifacts)
    image = next(
        token for name in ("image_token_id", "image_token_index") if (token := getattr(whole.config, name, None))
    )
    ids = torch.tensor([[image if number >= opened.manifest.vocab_size else number for number in numbers]])
    given = {name: torch.from_numpy(value) for name, value in _inputs(whole.config, opened.tiling(picture)).items()}
    if "image_grid_thw" in given:
        given["mm_token_type_ids"] = (ids == image).int()
    with torch.no_grad():
        wanted = whole(input_ids=ids, attention_mask=torch.ones_like(ids), **given).logits[0].float().numpy()
    found = opened.logits(np.array([numbers]))[0]
    difference = float(np.abs(found - wanted).max() / wanted.std())
    if not difference <= TOLERANCE:
        raise WrongOutputsError(
            f"{package} is wrong and is not kept: about a picture its logits are {difference:.3g} standard deviations "
            f"away from those of the whole dequantized model (allowed: {TOLERANCE:g}), though its parts are right"
        )
    return Sight(difference, len(numbers))


def _values(model: Path) -> int:
    """Numbers in the checkpoint."""
    parts = (Checkpoint.open(model, part=part) for part in PARTS)
    return sum(math.prod(shape) for part in parts for shape in part.owned().values())


def _overwrite(whole: Any, artifacts: Iterable[Path]) -> None:
    """Put the artifacts' values into the whole model, whose names for the language model are its own."""
    import torch

    parameters = dict(whole.named_parameters(remove_duplicate=False))

    def put(name: str, values: Any) -> None:
        names = (name, *(name.replace("model.", f"model.{part}.", 1) for part in _LANGUAGE))
        place = next((parameters[one] for one in names if one in parameters), None)
        if place is None:
            raise UnsupportedError(f"{type(whole).__name__} has no parameter {name}")
        place.copy_(torch.from_numpy(np.array(values)).reshape(place.shape))

    with torch.no_grad():
        for path in artifacts:
            artifact = Artifact.open(path)
            for name, values in artifact.overrides().items():
                put(name, values)
            for layer in artifact.names():
                for module in (layer, *artifact.entry(layer).info.shared_with):
                    put(f"{module}.weight", artifact.linear(layer).dequantize())


def _inputs(config: Any, tiles: Tiles) -> dict[str, Any]:
    """Pixels of a picture as transformers' whole model takes them."""
    from roundexport.graph.grid_stages import grid_sizes
    from roundexport.runtime.picture_lists import PictureLists

    vision, pixels = config.vision_config, tiles.pixels
    if not hasattr(vision, "temporal_patch_size"):
        return {"pixel_values": pixels[None] if hasattr(config, "scale_factor") else pixels}
    lists = PictureLists(**grid_sizes(config))
    rows, columns = lists.grid(pixels)
    return {
        "pixel_values": lists.patches(pixels[0]),
        "image_grid_thw": np.array([[1, rows * lists.merge, columns * lists.merge]]),
    }
