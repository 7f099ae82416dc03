"""What a method decides and what a person asks for: the one fills what the other left open, and never overrules it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from roundexport.algorithms.rounding import bct
from roundexport.errors import UsageError
from roundexport.tuning.chosen_methods import with_samples
from roundexport.tuning.recipes import resolve
from roundexport.tuning.setting_field import described, setting
from roundexport.tuning.settings import TuneSettings

NEEDED = bct.METHOD.scheme_needs.values()


def test_the_usual_values_hold_where_no_method_has_a_say() -> None:
    plain = TuneSettings().settled()
    assert (plain.scale_dtype, plain.embedding_bits, plain.everything) == ("float16", 8, False)
    assert TuneSettings().to_json()["embedding_bits"] == 8
    assert TuneSettings(embedding_bits=None).schemes.embedding_bits is None


def test_a_method_fills_what_was_left_open() -> None:
    found = TuneSettings(embedding_bits=4).settled(NEEDED, "bct")
    assert {name: getattr(found, name) for name in NEEDED} == NEEDED


@pytest.mark.parametrize(
    "asked",
    [{"scale_dtype": "float16"}, {"scale_dtype": "float32"}, {"embedding_bits": 8}, {"embedding_bits": None},
     {"everything": False}],
)  # fmt: skip
def test_a_method_does_not_overrule_what_was_asked_for(asked: dict[str, Any]) -> None:
    ((name, value),) = asked.items()
    with pytest.raises(UsageError, match=f"algorithm bct needs {name} {NEEDED[name]}, but {name} {value} was asked"):
        TuneSettings(**asked).settled(NEEDED, "bct")


def test_every_field_says_what_it_is_for_once() -> None:
    found = described(TuneSettings)
    assert list(found) == [field.name for field in dataclasses.fields(TuneSettings)]
    for name, (field, about) in found.items():
        assert f"        {name}: {about.help}\n" in (TuneSettings.__doc__ or ""), name
        if about.read is not None:
            assert about.read(about.written(field.default), f"--{name}") == field.default, name


def test_a_field_without_words_is_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Settings:
        said: int = setting(1, "One.")
        silent: int = 2

    with pytest.raises(KeyError):
        described(Settings)
    with pytest.raises(ValueError, match="must be a sentence"):
        setting(1, "")


@pytest.mark.parametrize(
    ("asked", "algorithm", "own", "samples"),
    [
        ({}, "gram", (), 128),
        ({"recipe": "light"}, "gram", ("gram.searches=0",), 16),
        ({"recipe": "light", "num_samples": 64}, "gram", ("gram.searches=0",), 64),
        ({"recipe": "light", "algorithm": "optimal_rtn"}, "optimal_rtn", (), 16),
        (
            {"recipe": "light", "method_settings": ("gram.searches=2",)},
            "gram",
            ("gram.searches=0", "gram.searches=2"),
            16,
        ),
        ({"recipe": "best", "algorithm": "gram"}, "gram", resolve(TuneSettings(recipe="best")).method_settings, 128),
    ],
)
def test_a_recipe_has_settings_and_samples_of_its_own(
    asked: dict[str, Any], algorithm: str, own: tuple[str, ...], samples: int
) -> None:
    settings = TuneSettings(**asked)
    found = resolve(settings)
    assert (found.algorithm, found.method_settings, settings.samples) == (algorithm, own, samples)


def test_a_recipes_own_method_named_by_hand_is_the_recipe() -> None:
    assert TuneSettings(recipe="best", algorithm="gram").usual_gain == TuneSettings(recipe="best").usual_gain < 1
    assert TuneSettings(recipe="best", algorithm="signround").usual_gain == 1.0


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"choices": (2, 3)}, r"choices \(2, 3\) does nothing without target_bits, target_kl or target_speedup"),
        ({"group_choices": (None,)}, "group_choices .* does nothing without target_bits"),
        ({"tie": True}, "tie True does nothing"),
        ({"scoring": "delta_loss"}, "scoring delta_loss does nothing"),
        ({"kl_gain": 0.5, "target_bits": 3.5}, r"kl_gain 0\.5 does nothing without target_kl"),
        ({"cost_target": "openvino", "target_bits": 3.5}, "cost_target openvino does nothing without cost latency"),
        ({"target_kl": 0.1, "group_size": 64}, "group_size 64 would be that of tables alone; give group_choices 64"),
        ({"embedding_bits": None, "embedding_group_size": 64}, "embedding_group_size 64 does nothing where"),
        *(
            ({"bits": 8, budget: 4.0}, "bits 8 does nothing where bits are chosen per layer: give choices 8")
            for budget in ("target_bits", "target_kl")
        ),
    ],
)
def test_what_would_do_nothing_is_refused(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        TuneSettings(**asked)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_samples", 0), ("num_samples", -1), ("num_samples", 1.5), ("sample_len", 0), ("sample_len", 7),
     ("batch_size", 2.0), ("steps", 0), ("seed", -1), ("seed", 0.5), ("seed", 2**64), ("recipe", "nope"),
     ("device", ""), ("device", "cpu:"), ("precision", "half"), ("part", "half"), ("sample_len", None), ("bits", 4.0),
     ("group_size", 64.0), ("target_bits", "4"), ("target_kl", True), ("algorithm", ""), ("rules", "")],
)  # fmt: skip
def test_values_without_sense_are_refused_at_construction(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name}.*{value}"):
        TuneSettings(**{name: value})


def test_a_target_of_kernel_times_that_does_not_exist_is_refused_at_construction() -> None:
    with pytest.raises(UsageError, match="cost_target must be onnx or openvino, not 'opnvino'"):
        TuneSettings(cost="latency", target_kl=0.1, cost_target="opnvino")


def test_without_a_budget_nothing_is_left_that_needs_one() -> None:
    asked = TuneSettings(target_kl=0.1, kl_gain=0.5, choices=(2, 3), group_choices=(64,), group_size=64, tie=True)
    assert asked.without_budget() == TuneSettings(group_size=64)
    fast = TuneSettings(cost="latency", target_speedup=1.2, cost_target="openvino", group_size=32)
    assert fast.without_budget() == TuneSettings(group_size=32)


@pytest.mark.parametrize(
    ("asked", "count"),
    [
        ({"recipe": "rtn", "transform": "activation_smoothing"}, 16),
        ({"transform": "activation_smoothing", "method_settings": ("activation_smoothing.samples=40",)}, 128),
        (
            {"recipe": "rtn", "transform": "activation_smoothing", "num_samples": 64},
            64,
        ),
        (
            {
                "recipe": "rtn",
                "transform": "activation_smoothing",
                "method_settings": ("activation_smoothing.samples=40",),
            },
            40,
        ),
        ({"recipe": "rtn", "target_bits": 4.0}, 24),
        ({"recipe": "rtn", "target_bits": 4.0, "calibration": "a.txt:0.98,b.txt:0.02"}, 128),  # of 24 b has none
        ({"recipe": "rtn", "activations": True}, 8),
        ({"recipe": "rtn", "transform": "teq"}, 128),
        ({"recipe": "rtn", "finish": "end_to_end", "target_bits": 4.0}, 128),
        ({"recipe": "light", "target_bits": 4.0}, 16),
        ({"recipe": "default", "target_bits": 4.0}, 128),
        ({"recipe": "bct"}, 128),
    ],
)
def test_no_more_samples_are_taken_than_anything_looks_at(asked: dict[str, Any], count: int) -> None:
    assert with_samples(TuneSettings(**asked)).samples == count
