"""Every family of the shipped table, tried again: what was right is right and as fused, nothing fails."""

from __future__ import annotations

import pytest

from roundexport.families.configurations import families
from roundexport.families.proving import Prover
from roundexport.families.table import proven

PROVER = Prover("roundexport.families.trial")
SHIPPED = {row.family: row for row in proven().rows}


@pytest.mark.compat
@pytest.mark.parametrize("family", families())
def test_it_is_what_the_table_says(family: str) -> None:
    row = PROVER.prove(families()[family], ("onnx", "openvino"))
    for target, outcome in row.outcomes.items():
        lost = outcome.lost_since(SHIPPED[family].outcomes[target])
        assert not lost, f"{target}: {lost}"
