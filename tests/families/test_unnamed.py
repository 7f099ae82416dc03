"""Architectures that no row of the table and no file of this project names: they convert as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

import roundexport
from roundexport.families.configurations import Family, families
from roundexport.families.proving import Prover

COMMON = dict(families()["llama"].values)
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
MIXED = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
# Norms behind linears, windows and layers without positions; rotary halves, one q/k/v and norms in it; experts.
UNNAMED = {
    "exaone4": Family("exaone4", "Exaone4Config", "Exaone4ForCausalLM", {**COMMON, **MIXED}),
    "persimmon": Family("persimmon", "PersimmonConfig", "PersimmonForCausalLM", {**COMMON, **HALF}),
    "nemotron": Family("nemotron", "NemotronConfig", "NemotronForCausalLM", {**COMMON, **HALF}),
    "olmo": Family("olmo", "OlmoConfig", "OlmoForCausalLM", {**COMMON, "clip_qkv": 8.0}),
    "hunyuan_v1_moe": Family(
        "hunyuan_v1_moe", "HunYuanMoEV1Config", "HunYuanMoEV1ForCausalLM", {**COMMON, **EXPERTS, "moe_topk": 2}
    ),
}
ROOM = Path(roundexport.__file__).resolve().parent


@pytest.mark.parametrize("family", UNNAMED)
def test_nobody_names_it(family: str) -> None:
    assert UNNAMED[family].config not in {row.config for row in families().values()}
    assert not (ROOM / "graph" / "architectures" / f"{family}.py").exists()


@pytest.mark.compat
@pytest.mark.parametrize("family", UNNAMED)
def test_it_converts(family: str) -> None:
    row = Prover("roundexport.families.trial").prove(UNNAMED[family], ("onnx", "openvino"))
    print(row.to_json())
    assert {name: outcome.state for name, outcome in row.outcomes.items()} == {"onnx": "right", "openvino": "right"}
