"""How tables of an integer encoder are cut: small groups where a table has few rows, as their scales then cost nothing.

A scale is a byte.  Words have a scale a row, which is a hundredth of a row already.  Positions and token types have a
few hundred rows and two, but an error of theirs is in every text: in all-MiniLM-L6-v2 the one row of the type that all
tokens have cost more with one scale than all words did, and groups of 32 leave a fifth of a position's error.

Limits: groups of 16 would leave a little less, but OpenVINO (2026.4.1) computes something else with a table of two rows
in such groups inside this graph, though a Gather of it alone is right; the output check finds it.
"""

from __future__ import annotations

from roundexport.quant.spec import QuantSpec

POWERS = QuantSpec(4, None, True, "exponent8")
_FEW, _GROUP = 1024, 32  # rows up to which a table has groups, and their size


def table_spec(rows: int, width: int) -> QuantSpec:
    """The scheme of a table [rows, width]."""
    return QuantSpec(4, _GROUP if rows <= _FEW and width % _GROUP == 0 else None, True, "exponent8")
