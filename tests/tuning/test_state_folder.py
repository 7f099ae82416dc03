"""`<out>.partial`: only what a run left is taken up or removed, and damage in it is found before it is gone on from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from roundexport.calibration.samples import Calibration
from roundexport.errors import UsageError
from roundexport.formats.artifact_writer import ArtifactWriter
from roundexport.kernels import round_to_nearest
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.tuning.checkpointing import TuneState, open_state
from roundexport.tuning.state_folder import refuse_existing

SPEC = QuantSpec(4, 16)
LAYERS = [(LinearInfo(name, 32, 8, "linear"), SPEC) for name in ("a.up", "a.down")]


def users_folder(path: Path) -> Path:
    (path / "thesis").mkdir(parents=True)
    (path / "thesis" / "chapter.tex").write_text("years of work")
    return path


@contextmanager
def begun(out: Path, resume: bool = True) -> Iterator[TuneState]:
    with open_state(out, {"bits": 4}, resume) as state:
        yield state


@pytest.mark.parametrize("resume", [True, False])
def test_a_users_folder_of_that_name_is_refused_untouched(tmp_path: Path, resume: bool) -> None:
    folder = users_folder(tmp_path / "out.partial")
    with pytest.raises(UsageError, match=r"out\.partial.* was not made by roundexport; rename it, or choose"):
        with begun(tmp_path / "out", resume):
            pass
    assert (folder / "thesis" / "chapter.tex").read_text() == "years of work"


@pytest.mark.parametrize("name", ["state.json", "tuning.json"])
@pytest.mark.parametrize(
    "content", ['{"format": "another program/1"}', "not JSON", "[" * 100_000, '["roundexport-tuning/2"]']
)
def test_a_users_file_of_that_name_does_not_make_it_ours(tmp_path: Path, name: str, content: str) -> None:
    folder = users_folder(tmp_path / "out.partial")
    (folder / name).write_text(content)
    with pytest.raises(UsageError, match="was not made by roundexport"), begun(tmp_path / "out", resume=False):
        pass
    assert sorted(path.name for path in folder.iterdir()) == sorted([name, "thesis"])


def test_a_link_of_that_name_is_refused_and_its_target_untouched(tmp_path: Path) -> None:
    target = users_folder(tmp_path / "elsewhere")
    (target / "state.json").write_text('{"format": "roundexport-tuning/2"}')
    (tmp_path / "out.partial").symlink_to(target)
    with pytest.raises(UsageError, match="was not made by roundexport"), begun(tmp_path / "out", resume=False):
        pass
    assert (target / "thesis" / "chapter.tex").exists()


@pytest.mark.parametrize(
    "inside", ["artifact", "artifact/quantized-00001-of-00001.safetensors", "hidden-00001.safetensors"]
)
def test_a_link_inside_a_state_is_refused(tmp_path: Path, inside: str) -> None:
    with begun(tmp_path / "out") as state:
        path = state.folder / inside
    if path.is_dir():
        path.rmdir()
    path.symlink_to(users_folder(tmp_path / "elsewhere"))
    with pytest.raises(UsageError, match="is a link, which no run leaves"), begun(tmp_path / "out"):
        pass


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("mine")
    with pytest.raises(UsageError, match="is in its way"), begun(tmp_path / "out"):
        pass
    assert (tmp_path / "out.partial").read_text() == "mine"


@pytest.mark.parametrize("left", [(), (".tuning.json.partial-7",)])
def test_what_a_run_leaves_that_is_killed_at_its_very_beginning_is_taken_up(tmp_path: Path, left: tuple[str]) -> None:
    (tmp_path / "out.partial").mkdir()
    for name in left:
        (tmp_path / "out.partial" / name).touch()
    with begun(tmp_path / "out") as state:
        assert state.blocks_done == 0
        assert sorted(p.name for p in state.folder.iterdir()) == ["artifact", "state.json", "tuning.json"]


def test_a_state_with_a_damaged_state_file_can_be_begun_again(tmp_path: Path) -> None:
    with begun(tmp_path / "out") as state:
        pass
    (state.folder / "state.json").write_text("{")
    with pytest.raises(UsageError, match=f"to begin again remove {state.folder} .tune also takes --no-resume"):
        with begun(tmp_path / "out"):
            pass
    with begun(tmp_path / "out", resume=False) as state:
        assert state.layers_done == ()


def test_what_a_run_killed_after_publishing_left_is_removed_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with begun(out) as state:
        (state.artifact / "manifest.json").write_text("{}")
        state.artifact.rename(out)
    with pytest.raises(UsageError, match="exists already"):
        refuse_existing(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_users_folder_beside_a_finished_artifact_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text("{}")
    folder = users_folder(tmp_path / "out.partial")
    with pytest.raises(UsageError, match="exists already"), begun(out):
        pass
    assert (folder / "thesis" / "chapter.tex").exists()


def linear(seed: int) -> QuantizedLinear:
    import torch

    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
    return round_to_nearest.run(weight, SPEC)


def interrupted(out: Path) -> Path:
    """A run that was stopped with two layers and its calibration recorded."""
    with begun(out) as state:
        state.record_calibration(Calibration(np.arange(8).reshape(2, 4), {"kind": "test"}, ()))
        writer = ArtifactWriter(state.artifact, LAYERS)
        for seed, (info, _) in enumerate(LAYERS):
            writer.add(info.name, linear(seed))
        writer.sync()
        state.record_layers([info.name for info, _ in LAYERS])
        writer.close()
        return state.folder


def test_an_undamaged_state_is_gone_on_from(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    with begun(tmp_path / "out") as state:
        assert state.layers_done == ("a.up", "a.down")


@pytest.mark.parametrize(
    ("name", "offset", "told"),
    [
        ("artifact/quantized-00001-of-00001.safetensors", -1, r"layer a\.(up|down)"),
        ("artifact/quantized-00001-of-00001.safetensors", -300, r"layer a\.(up|down)"),
        ("calibration.safetensors", -1, r"calibration\.safetensors"),
        ("artifact/quantized-00001-of-00001.safetensors", 20, "to begin again remove"),
    ],
)
def test_one_flipped_bit_in_what_is_done_is_found(tmp_path: Path, name: str, offset: int, told: str) -> None:
    path = interrupted(tmp_path / "out") / name
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError, match=told) as caught, begun(tmp_path / "out"):
        pass
    assert "--no-resume" in str(caught.value)
    with begun(tmp_path / "out", resume=False) as state:
        assert state.layers_done == ()
