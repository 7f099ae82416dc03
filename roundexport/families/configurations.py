"""The families that are tried: a config class of transformers each, shrunk to two layers, in configurations.json.

    common     values that every config gets, whatever it calls its sizes; those it does not know do no harm
    families   name -> config and model class, values of its own, common values that its class does not take, the
               pooling of a sentence-transformers folder, the class of its exported part, and the step of its weights
               (toy.py)

Values of its own win.  A row is there for a structure, not for a size: windows, shared keys, scaled rotary angles,
experts, heads.  To try another family add a row and run `roundexport list families NAME --prove`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from roundexport.errors import UsageError
from roundexport.storage.strict_json import parse

FILE = Path(__file__).with_name("configurations.json")


@dataclass(frozen=True)
class Family:
    """A configuration to be tried.

    Args:
        name: by which it is listed.
        config: transformers' class of its config.
        model: transformers' class of the model, head included.
        values: what the config is made with.
        pooling: sentence-transformers' word for how it is pooled; None: not such a folder.
        part: transformers' class of the part of the model that is exported; None: it is the whole.
        step: weights are multiples of 2^-step; more for a structure that amplifies rounding with weights this large.
    """

    name: str
    config: str
    model: str
    values: Mapping[str, Any]
    pooling: str | None = None
    part: str | None = None
    step: int = 8


@cache
def families() -> Mapping[str, Family]:
    """All of them by name, in the order of the table."""
    found = parse(FILE.read_bytes(), str(FILE))
    return MappingProxyType({name: _family(name, row, found["common"]) for name, row in found["families"].items()})


def _family(name: str, row: Mapping[str, Any], common: Mapping[str, Any]) -> Family:
    usual = {key: value for key, value in common.items() if key not in row.get("without", ())}
    values = {**usual, **row.get("values", {})}
    return Family(name, row["config"], row["model"], values, row.get("pooling"), row.get("part"), row.get("step", 8))


def chosen(names: Sequence[str]) -> list[Family]:
    """Families by name, or all where none is named.

    Raises:
        UsageError: unknown names.
    """
    known = families()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"unknown families {', '.join(unknown)}; known: {', '.join(known)}")
    return [known[name] for name in names] if names else list(known.values())
