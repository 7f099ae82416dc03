"""Rules: which wins, what guards do without them, and every way in which a file of rules is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from roundexport.errors import SpecError, UsageError
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.schemes.rules import LinearScheme, Rule, decide, read_rules, rows

LAYERS = [
    LinearInfo(f"model.layers.{i}.{name}", width, 64)
    for i in (0, 1, 10)
    for name, width in (("self_attn.q_proj", 128), ("mlp.gate_proj", 128), ("mlp.down_proj", 192))
]


def written(folder: Path, rules: Any) -> Path:
    path = folder / "rules.json"
    path.write_text(rules if isinstance(rules, str) else json.dumps(rules), encoding="utf-8")
    return path


def test_the_first_rule_that_matches_decides(tmp_path: Path) -> None:
    rules = read_rules(
        written(
            tmp_path,
            [
                {"match": r"layers\.1\..*q_proj$", "bits": 2, "reason": "robust"},
                {"match": "q_proj", "bits": 8, "group_size": None},
                {"match": r"^model\.layers\.0\.", "keep_float": True},
            ],
        )
    )
    found = {d.info.name: d for d in decide(LAYERS, LinearScheme(4, 64), rules)}
    assert found["model.layers.1.self_attn.q_proj"].spec == QuantSpec(2, 64, False), "2 bits alone means asymmetric"
    assert found["model.layers.10.self_attn.q_proj"].spec == QuantSpec(8, None, True), r"\. is no 0"
    assert found["model.layers.0.self_attn.q_proj"].spec == QuantSpec(8, None, True), "the earlier rule wins"
    assert found["model.layers.0.mlp.gate_proj"].spec is None
    assert found["model.layers.1.mlp.gate_proj"].spec == QuantSpec(4, 64, True)
    assert [d.bits_fixed for d in found.values()] == [True, False, False, True, False, False, True, False, False]
    assert found["model.layers.1.self_attn.q_proj"].reason == "robust"


def test_rules_leave_what_they_do_not_name_to_the_settings() -> None:
    (decision, *_) = decide(LAYERS, LinearScheme(3, 32, True, "float32"), [Rule("q_proj", {"group_size": 16})])
    assert decision.spec == QuantSpec(3, 16, True, "float32") and not decision.bits_fixed


@pytest.mark.parametrize(
    ("asked", "width", "group"), [(128, 192, 64), (256, 144, 16), (32, 100, None), (None, 100, None), (64, 64, 64)]
)
def test_a_group_size_that_does_not_fit_falls_back(asked: int | None, width: int, group: int | None) -> None:
    (decision,) = decide([LinearInfo("a", width, 8)], LinearScheme(4, asked))
    assert decision.spec == QuantSpec(4, group)
    assert (decision.by == "guard") == (group != asked) and bool(decision.reason) == (group != asked)


def test_a_group_size_that_a_rule_asks_for_must_fit() -> None:
    with pytest.raises(SpecError, match=r"model\.layers\.0\.mlp\.down_proj: group_size 128 does not divide K=192"):
        decide(LAYERS, LinearScheme(4, 32), [Rule("down_proj", {"group_size": 128})])
    decisions = decide(LAYERS, LinearScheme(4, 128), [Rule("down_proj", {"bits": 8}, reason="wide")])
    assert (
        decisions[2].spec == QuantSpec(8, 64)
        and decisions[2].reason == "wide; 128 does not divide K=192: group size 64"
    )


@pytest.mark.parametrize(
    "name", ["mlp.gate", "block_sparse_moe.router", "mlp.shared_expert_gate", "router.layer", "linear_attn.in_proj_ba",
             "linear_attn.in_proj_a", "mixer.dt_proj"],
)  # fmt: skip
def test_routers_and_gates_stay_float_unless_a_rule_says_otherwise(name: str) -> None:
    layers = [LinearInfo(f"layers.0.{name}", 64, 8), LinearInfo("layers.0.mlp.gate_proj", 64, 8)]
    guarded, plain = decide(layers, LinearScheme(4, 32))
    assert guarded.spec is None and guarded.by == "guard" and plain.spec == QuantSpec(4, 32)
    overridden, _ = decide(layers, LinearScheme(4, 32), [Rule(rf"{name}$", {"bits": 8})])
    assert overridden.spec == QuantSpec(8, 32)


def test_low_rank_projections_are_no_gates() -> None:
    layers = [LinearInfo(f"layers.0.self_attn.{n}", 64, 8) for n in ("q_b_proj", "kv_b_proj", "q_a_proj")]
    assert all(d.spec is not None for d in decide(layers, LinearScheme(4, 32)))


def test_the_table_says_what_each_rule_took() -> None:
    rules = [Rule("q_proj", {"bits": 8}, reason="attention"), Rule(r"\.0\.", keep_float=True)]
    table = rows(decide(LAYERS, LinearScheme(4, 128), rules))
    assert table == [
        {"rule": "q_proj", "scheme": "int8 g128 sym", "layers": 3, "first": "model.layers.0.self_attn.q_proj",
         "reason": "attention"},
        {"rule": r"\.0\.", "scheme": "float", "layers": 2, "first": "model.layers.0.mlp.gate_proj",
         "reason": "a rule keeps it float"},
        {"rule": "default", "scheme": "int4 g128 sym", "layers": 2, "first": "model.layers.1.mlp.gate_proj",
         "reason": ""},
        {"rule": "guard", "scheme": "int4 g64 sym", "layers": 2, "first": "model.layers.1.mlp.down_proj",
         "reason": "128 does not divide K=192: group size 64"},
    ]  # fmt: skip


def test_a_rule_that_decides_nothing_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"rule 'lm_head' matches no layer.*embedding_bits"):
        decide(LAYERS, LinearScheme(), [Rule("lm_head", {"bits": 8})])
    with pytest.raises(UsageError, match=r"rule 'q_proj' decides no layer: an earlier rule, 'self_attn'"):
        decide(LAYERS, LinearScheme(), [Rule("self_attn", {"bits": 8}), Rule("q_proj", {"bits": 2})])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("[", "not valid JSON"),
        ({"match": "a", "bits": 8}, "expected a list of objects"),
        ([{"match": "a", "bit": 8}], "rule 1: unknown key 'bit'; did you mean 'bits'"),
        ([{"match": "a", "color": 8}], "rule 1: unknown key 'color'; Known keys: match"),
        ([{"match": "a", "bits": 8}, {"bits": 8}], "rule 2: key 'match' is missing"),
        ([{"match": "a", "keep_float": 1}], "keep_float must be true or false"),
        ([{"match": "(", "bits": 8}], "is not a regular expression"),
        ([{"match": "a"}], "nothing to do"),
        ([{"match": "a", "keep_float": True, "bits": 8}], "not both"),
        ([{"match": "a", "bits": 5}], "bits 5 is not supported"),
        ([{"match": "a", "bits": True}], "bits must be a whole number, not True"),
        ([{"match": "a", "group_size": "32"}], "group_size must be a whole number or null, not '32'"),
        ([{"match": "a", "symmetric": "yes"}], "symmetric must be true, false or null"),
    ],
)
def test_bad_rules_are_refused(rules: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        read_rules(written(tmp_path, rules))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no\.json cannot be read"):
        read_rules(tmp_path / "no.json")
