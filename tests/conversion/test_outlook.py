"""What a conversion says and checks before any work; claims by content; groups as they will really be."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import tuned
from roundexport import TuneSettings, inspect
from roundexport.algorithms.parts import fisher_parts
from roundexport.conversion import convert as convert_module
from roundexport.conversion.claimed_folder import claimed
from roundexport.conversion.outlook import check_room, outlook
from roundexport.conversion.package_size import package_bytes
from roundexport.errors import UsageError, WontFitError
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.model_config import hidden_width
from roundexport.model.tensor_names import is_table
from roundexport.quant.spec import QuantSpec
from roundexport.schemes.rules import fitting, other_groups
from roundexport.tuning import output_fisher
from roundexport.tuning.disk_need import planned_output_bytes
from roundexport.tuning.job import Job
from roundexport.tuning.planned_run import PlannedRun
from roundexport.tuning.recipes import RECIPES, Composition

Models = Callable[[str], Path]
Disk = namedtuple("Disk", "total used free")
Memory = namedtuple("Memory", "total")


def test_a_disk_that_is_too_small_is_told_before_tuning(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    said = check_room(checkpoint, TuneSettings(), tmp_path / "not" / "there", ["onnx", "openvino"])
    finished = check_room(checkpoint, TuneSettings(finish="end_to_end"), tmp_path, ["onnx"])
    assert "2 packages" in said and "a package while it is written" in said and "that is finished" not in said
    assert "the artifact that is finished" in finished and "while it is written" not in finished
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(1 << 30, 0, 1 << 20))
    with pytest.raises(WontFitError, match=r"the conversion takes about 0\.0\d GiB of disk \(.*2 packages"):
        check_room(checkpoint, TuneSettings(), tmp_path / "out", ["onnx", "openvino"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(1 << 30, 0, 1 << 10))
    with pytest.raises(WontFitError, match=r"the conversion takes about .*\(1 packages .*\)"):
        check_room(checkpoint, TuneSettings(), tmp_path / "out", ["onnx"], tuned=True)


def test_room_is_asked_for_where_only_packages_are_left_to_make(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(_: Any, folder: Path, *__: Any) -> None:
        (folder / "artifact").mkdir()
        (folder / "artifact" / "manifest.json").write_text("{}")
        raise UsageError("stopped")

    monkeypatch.setattr(convert_module, "refusals", lambda *_: {})
    monkeypatch.setattr(convert_module, "_make_artifact", made)
    with pytest.raises(UsageError, match="stopped"):
        convert_module.convert(models("llama"), tmp_path / "out", to="onnx", progress=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(1 << 30, 0, 1 << 10))
    with pytest.raises(WontFitError, match=r"the conversion takes about .*\(1 packages"):
        convert_module.convert(models("llama"), tmp_path / "out", to="onnx", progress=False)


def test_what_an_interrupted_run_left_is_not_asked_for_again(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    monkeypatch.setattr("roundexport.conversion.outlook.package_bytes", lambda *_: 4 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(1 << 40, 0, 7 << 30))
    monkeypatch.setattr("roundexport.environment.memory.memory_limit", lambda: None)
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(32 << 30))
    with pytest.raises(WontFitError, match=r"takes about 8\.\d\d GiB of disk .*, 7\.00 GiB are free"):
        check_room(checkpoint, TuneSettings(), tmp_path, ["onnx"])
    left = tmp_path / "artifact.partial" / "model.safetensors"
    left.parent.mkdir()
    with left.open("wb") as file:
        file.truncate(2 << 30)
    assert check_room(checkpoint, TuneSettings(), tmp_path, ["onnx"]).startswith("about 6.")


def test_rounds_of_a_search_are_asked_for(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, asked = Checkpoint.open(models("llama")), TuneSettings(recipe="light", target_kl=0.1)
    sizes = {8: 3 << 30, 4: 1 << 30}
    monkeypatch.setattr("roundexport.conversion.outlook.package_bytes", lambda _, settings: sizes[settings.bits])
    monkeypatch.setattr("roundexport.environment.memory.memory_limit", lambda: None)
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(32 << 30))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(1 << 40, 0, 1 << 40))
    said = check_room(checkpoint, asked, tmp_path, ["onnx"])
    assert said.startswith("about 8.") and "artifacts of rounds 6.00" in said  # the floor has 8 bits
    given = dataclasses.replace(asked, kl_gain=0.5)
    assert "rounds" not in check_room(checkpoint, given, tmp_path, ["onnx"])
    for left in ("floor/artifact", "1/artifact.partial"):
        (tmp_path / "rounds" / left).mkdir(parents=True)
        with (tmp_path / "rounds" / left / "model.safetensors").open("wb") as file:
            file.truncate(2 << 30)
    assert check_room(checkpoint, asked, tmp_path, ["onnx"]).startswith("about 4.")
    state = tmp_path / "rounds" / "1" / "artifact.partial"
    (state / "state.json").write_text('{"fisher": true}')
    best = dataclasses.replace(asked, recipe="best", group_choices=(32,))
    assert "what errors" not in check_room(checkpoint, best, tmp_path, ["onnx"]), "its blocks have removed them"


def test_what_errors_of_outputs_cost_is_asked_for_until_it_is_measured(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, best = Checkpoint.open(models("llama")), TuneSettings(recipe="best", group_size=32)
    rows = output_fisher.rows_of(Job.of(models("llama"), best).plan)
    expected = sum(4 * n * len(fisher_parts(n)[0]) for n in rows.values())
    assert planned_output_bytes(PlannedRun(checkpoint, best)) == expected > 0
    assert planned_output_bytes(PlannedRun(checkpoint, TuneSettings(group_size=32))) == 0
    monkeypatch.setattr("roundexport.conversion.outlook.planned_output_bytes", lambda *_: 8 << 30)
    assert "what errors of outputs cost 8.00" in check_room(checkpoint, best, tmp_path, ["onnx"])
    state = tmp_path / "artifact.partial"
    state.mkdir()
    with (state / "fisher-00001.safetensors").open("wb") as file:  # half of them
        file.truncate(4 << 30)
    said = check_room(checkpoint, best, tmp_path, ["onnx"])
    assert said.startswith("about 4.") and "what errors of outputs cost 8.00" in said
    (state / "state.json").write_text('{"fisher": true}')  # all, and a block has removed its own
    said = check_room(checkpoint, best, tmp_path, ["onnx"])
    assert said.startswith("about 0.") and "what errors of outputs cost 4.00" in said


@pytest.mark.parametrize("name", ["hidden_size", "n_embd", "d_model", "dim", "emb_dim"])
def test_hidden_states_have_a_width_in_every_config(name: str) -> None:
    assert hidden_width({name: 64}) == 64 and hidden_width({}) == 0


def test_a_shared_expert_is_no_table() -> None:
    names = {
        "model.layers.0.mlp.shared_experts.gate_proj.weight": False,
        "shared.weight": True,
        "lm_head.weight": True,
        "transformer.wte.weight": True,
        "proj_out.weight": True,
        "model.decoder.embed_positions.weight": True,
    }
    assert {name: is_table(name) for name in names} == names


def test_tables_of_every_name_are_counted_as_tables(models: Models) -> None:
    checkpoint = Checkpoint.open(models("gpt2"))
    (table,) = (shape for name, shape in checkpoint.owned().items() if name.endswith("wte.weight"))
    more = [package_bytes(checkpoint, TuneSettings(bits=4, embedding_bits=bits)) for bits in (4, 8)]
    assert more[1] - more[0] > 1.15 * table[0] * table[1] * 4 / 8 * 0.99


def test_bits_that_are_chosen_are_counted_as_what_the_choice_may_take(models: Models) -> None:
    checkpoint = Checkpoint.open(models("llama"))

    def of(**asked: Any) -> float:
        return package_bytes(checkpoint, TuneSettings(**asked))

    fast: dict[str, Any] = {"cost": "latency", "choices": (2, 4, 8)}
    assert of(bits=4) < of(target_bits=5.5, choices=(4, 8)) < of(target_bits=7.9, choices=(4, 8)) < of(bits=8)
    assert of(target_bits=9.0, choices=(2, 4)) == of(target_kl=0.1, choices=(2, 4)) == of(bits=4)
    assert of(target_kl=0.1) == of(target_kl=0.1, kl_gain=0.5) == of(**fast, target_speedup=0.3) == of(bits=8)
    assert of(**fast, target_speedup=1.2) == of(bits=4)
    assert of(bits=4, embedding_bits=4) < of(target_bits=5.5, embedding_bits="plan") < of(target_bits=5.5)


def test_memory_that_is_too_small_is_told_before_tuning(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(1 << 10))
    monkeypatch.setattr("roundexport.environment.memory.memory_limit", lambda: None)
    with pytest.raises(WontFitError, match=r"takes about .* of memory \(.*\); this machine has 0\.00; choose"):
        check_room(Checkpoint.open(models("llama")), TuneSettings(), tmp_path, ["onnx"])


QWEN3_8B, QWEN3_30B = (4096, 12288, 36, 1, 151936), (2048, 768, 48, 128, 151936)


def of_shape(width: int, ffn: int, blocks: int, experts: int, words: int) -> Any:
    """A decoder's checkpoint of which there are only shapes."""
    block = {f"experts.{n}.{part}": (ffn, width) for n in range(experts) for part in ("gate", "up", "down")}
    block |= {"q": (width, width), "k": (width // 4, width), "v": (width // 4, width), "o": (width, width)}
    shapes = {f"model.layers.{n}.{name}": shape for n in range(blocks) for name, shape in block.items()}
    shapes |= {"model.embed_tokens.weight": (words, width), "lm_head.weight": (words, width)}
    config = {"hidden_size": width, "num_hidden_layers": blocks, "vocab_size": words}
    return SimpleNamespace(config=config, task="generate", owned=lambda: shapes, imported=None)


@pytest.mark.parametrize(("shape", "gib"), [(QWEN3_8B, 8), (QWEN3_30B, 24), (QWEN3_30B, 8)])
def test_a_conversion_asks_for_what_its_parts_hold(
    shape: tuple[int, ...], gib: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("roundexport.environment.memory._held", lambda: 1 << 29)
    monkeypatch.setattr("roundexport.conversion.outlook.has_tokenizer", lambda _: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(1 << 50, 0, 1 << 50))
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(32 << 30))
    settings = TuneSettings(max_ram=gib)
    check_room(of_shape(*shape), settings, tmp_path, ["onnx"])
    with pytest.raises(WontFitError, match="the package, twice while its runtime opens it"):  # which are opened whole
        check_room(of_shape(*shape), settings, tmp_path, ["onnx"], embeds=True)


def test_the_outlook_counts_calibration_and_verification(models: Models) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    assert "calibration text about" in outlook(checkpoint, TuneSettings(), ["onnx"])
    assert "calibration text" not in outlook(checkpoint, TuneSettings(recipe="rtn"), ["onnx"])
    given = outlook(checkpoint, TuneSettings(calibration="text.txt"), ["onnx"])
    assert "calibration" not in given and "verification about" in given


@pytest.mark.parametrize("field", ["rules", "calibration"])
def test_a_file_that_was_edited_is_another_request(field: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text('[{"match": "down_proj", "bits": 8}]')
    settings = TuneSettings(**{field: str(path)})
    before = settings.by_content()
    other = tmp_path / "same"
    other.write_bytes(path.read_bytes())
    assert TuneSettings(**{field: str(other)}).by_content() == before
    path.write_text('[{"match": "down_proj", "bits": 2}]')
    assert settings.by_content() != before


def test_a_recipe_that_is_composed_otherwise_is_another_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = TuneSettings(recipe="best")
    before = json.loads(json.dumps(asked.by_content()))
    assert before == asked.by_content() and before["methods"]["method_settings"]
    monkeypatch.setitem(RECIPES, "best", Composition("gram", finish="end_to_end"))
    assert asked.by_content() != before and TuneSettings().by_content() == TuneSettings(num_samples=128).by_content()
    folder = tmp_path / "out"
    folder.mkdir()
    for earlier in (before, {name: value for name, value in before.items() if name != "methods"}):
        (folder / "request.json").write_text(json.dumps(earlier))
        with (
            pytest.raises(UsageError, match="was begun with methods"),
            claimed(folder, asked.by_content(), None, {}),
        ):
            pass


def test_a_run_goes_on_with_more_memory(tmp_path: Path) -> None:
    for earlier in ({"bits": 4, "max_ram": 8}, {"bits": 4, "max_ram": None}):  # as once recorded, and as now
        (tmp_path / "request.json").write_text(json.dumps(earlier))
        request = {"bits": 4, "max_ram": TuneSettings(max_ram=16).by_content()["max_ram"]}
        with claimed(tmp_path, request, None, {}):
            pass


def test_groups_are_told_as_they_will_be() -> None:
    scheme = QuantSpec(4, 128)
    used = [(fitting(scheme, width)[0], width) for width in [576] * 6 + [1536]]
    assert other_groups(128, used) == "6 of 7 layers: group 64 (asked 128 does not divide K=576)"
    assert other_groups(128, used[6:]) == "" and other_groups(None, [(QuantSpec(4, None), 576)]) == ""
    whole = [(fitting(scheme, 100)[0], 100)]
    assert other_groups(128, whole) == "1 of 1 layers: whole rows (asked 128 does not divide K=100)"


def test_a_conversion_in_a_place_that_is_read_only_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any, *_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with monkeypatch.context() as patched, pytest.raises(UsageError, match="out: the file system is read-only"):
        patched.setattr(os, "mkdir", refuse)
        with claimed(tmp_path / "out", {}, None, {}):
            pytest.fail("claimed")
    assert not list(tmp_path.iterdir())


def test_an_artifact_is_described_when_its_model_is_gone(models: Models, tmp_path: Path) -> None:
    shutil.copytree(models("llama"), tmp_path / "m")
    tuned(tmp_path / "m", tmp_path / "a", algorithm="rtn", group_size=32)
    whole = inspect(tmp_path / "a")
    assert "bytes in all" in whole.facts and "not known" not in whole.facts
    (tmp_path / "m" / "config.json").write_text('{"model_type": "t5"}')  # another thing stands there
    for _ in range(2):
        found = inspect(tmp_path / "a")
        assert found.rows == whole.rows and found.facts["bytes of codes"] == whole.facts["bytes of codes"]
        assert "the float model is not where" in found.facts["not known"]
        shutil.rmtree(tmp_path / "m", ignore_errors=True)


def test_inspect_shows_the_groups_and_their_bits(models: Models) -> None:
    row = inspect(models("llama")).rows[1]
    assert row["scheme"] == "int4 g128 sym"
    assert row["other groups"] == "12 of 14 layers: group 64 (asked 128 does not divide K=64)"
    assert 4.125 < row["bits per weight"] < 4.25
