"""How tables of an integer encoder are cut: small groups where a table has few rows, as their scales then cost nothing.

A scale is a byte.  Words have a scale a row, which is a hundredth of a row already.  Positions and token types have a
few hundred rows and two, but an error of theirs is in every text: in all-MiniLM-L6-v2 the one row of the type that all
tokens have cost more with one scale than all words did, and groups of 16 leave a seventh of its error, groups of 32 a
fifth of a position's.
"""

from __future__ import annotations

from roundexport.quant.spec import QuantSpec

POWERS = QuantSpec(4, None, True, "exponent8")
_GROUPS = ((16, 16), (1024, 32))  # rows up to which a table has groups of so many


def table_spec(rows: int, width: int) -> QuantSpec:
    """The scheme of a table [rows, width]."""
    group = next((group for most, group in _GROUPS if rows <= most), None)
    return QuantSpec(4, group if group and width % group == 0 else None, True, "exponent8")
