"""CodeGen: GPT-J's attention, with its three projections in one."""

from __future__ import annotations

from .gptj import attend
from .interface import Architecture

ARCHITECTURE = Architecture({"CodeGenAttention._attn": attend}, given_up=True)
