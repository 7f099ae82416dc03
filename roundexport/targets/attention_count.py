"""What is counted of the attention layers of a package; fused_attention.py counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FusedAttention:
    """What was counted.

    Args:
        fused: attention layers in one operator.
        spelled_out: attention layers of several operators.
        rotary_inside: layers whose rotary embedding the attention operator does as well.
        rotary_operators: operators that do nothing but turn queries or keys.
    """

    fused: int
    spelled_out: int
    rotary_inside: int
    rotary_operators: int

    @property
    def layers(self) -> int:
        """All attention layers."""
        return self.fused + self.spelled_out

    def __str__(self) -> str:
        rotary = [f"{self.rotary_inside} with rotary inside"] if self.rotary_inside else []
        rotary += [f"{self.rotary_operators} rotary operators"] if self.rotary_operators else []
        return ", ".join([f"{self.fused} of {self.layers} attention layers in one operator", *rotary])
