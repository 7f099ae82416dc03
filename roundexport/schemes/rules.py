r"""Rules: which layers are quantized otherwise than the rest, from a JSON file; and the guards that apply without one.

    [
      {"match": "layers\\.0\\.",  "bits": 8, "reason": "first block"},
      {"match": "down_proj$",     "group_size": 32, "symmetric": false},
      {"match": "router",         "keep_float": true}
    ]

``match`` is a regular expression that is *searched* in the module path (write ^ and $ to pin it); the first rule that
matches a layer decides, later ones are not looked at.  A rule sets what it names: ``bits``, ``group_size`` (null: whole
rows), ``symmetric`` (null: by the bits); the rest follows the run's settings.  Where nothing else is said, 4 and 8 bits
are symmetric, 2 and 3 asymmetric.  A rule that matches no layer is an error, and so is a group size of a rule that does
not divide the K of a layer it matches.  Token embedding and lm_head follow embedding_bits, not rules.

Guards apply to layers that no rule of the user matches:

    routers and gates of experts     stay float: small, and an error sends a token to another expert
    gates of linear attention        stay float: small, and their error accumulates along the sequence
    group size that does not fit K   the largest smaller group size that divides K, or the whole row
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roundexport.errors import SpecError, UsageError
from roundexport.quant.spec import GROUP_SIZES, LinearInfo, QuantSpec

from .patterns import check_pattern, check_time
from .settings import LinearScheme

_LARGEST = 2**20  # bytes of a file of rules
_SCHEME_KEYS = ("bits", "group_size", "symmetric")
KEYS = ("match", *_SCHEME_KEYS, "keep_float", "reason")
_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "bits": ("a whole number", (int,)),
    "group_size": ("a whole number or null", (int, type(None))),
    "symmetric": ("true, false or null", (bool, type(None))),
}
_GUARDS = (
    (r"(^|\.)(gate|router|shared_expert_gate|router_gate|modality_router|router\.\w+)$", "a router of experts"),
    (r"(^|\.)(in_proj_(a|b|ba)|dt_proj|b_proj|a_proj|[fi]gate_preact|ifgate_preact)$", "a gate of linear attention"),
)


@dataclass(frozen=True)
class Rule:
    """One rule of the user.

    Args:
        match: regular expression, searched in the module path.
        changes: ``bits``, ``group_size`` and ``symmetric``, as far as the rule names them.
        keep_float: leave the layer as it is.
        reason: why, for the table and the manifest.

    Raises:
        UsageError: no regular expression, nothing to do, a contradiction, or a value that no scheme has.
    """

    match: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    keep_float: bool = False
    reason: str = ""

    def __post_init__(self) -> None:
        where = f"rule {self.match!r}"
        check_pattern(self.match, where)
        if bool(self.changes) == self.keep_float:
            wanted = "either keep_float or bits, group_size, symmetric, not both" if self.changes else "nothing to do"
            raise UsageError(f"{where}: {wanted}; it takes keep_float, or some of {', '.join(_SCHEME_KEYS)}")
        for key, value in self.changes.items():
            wanted, kinds = _KINDS[key]
            if type(value) not in kinds:  # exactly: 4.0 equals 4, and true equals 1
                raise UsageError(f"{where}: {key} must be {wanted}, not {value!r}")
        try:
            LinearScheme().spec(self.changes)
        except SpecError as error:
            raise UsageError(f"{where}: {error}") from error


@dataclass(frozen=True)
class Decision:
    """What becomes of one layer.

    Args:
        info: the layer.
        spec: its scheme; None keeps it float.
        by: ``default``, ``guard``, or the ``match`` of the rule.
        reason: why it is not as the run's settings say; empty where it is.
        bits_fixed: a rule names its bits, so no search for bits may change them.
    """

    info: LinearInfo
    spec: QuantSpec | None
    by: str = "default"
    reason: str = ""
    bits_fixed: bool = False


def read_rules(path: str | Path) -> tuple[Rule, ...]:
    """Read a file of rules.

    Raises:
        UsageError: it cannot be read, is no list of rules, or holds an unknown key or a value of the wrong kind.
    """
    data = _read_json(Path(path), f"rules {path}")
    if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
        raise UsageError(f"rules {path}: expected a list of objects, as in "
                         '[{"match": "down_proj$", "bits": 8}]')  # fmt: skip
    return tuple(_rule(entry, f"rules {path}, rule {number}") for number, entry in enumerate(data, 1))


def _read_json(path: Path, where: str) -> Any:
    if path.exists() and not path.is_file():
        raise UsageError(
            f"{where}: not a regular file; rules are read again when a run is resumed, so save them in one"
        )
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise UsageError(f"{where}: larger than {_LARGEST:,} bytes; is this a file of rules?")
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise UsageError(f"{where} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise UsageError(f"{where}: not valid JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} stands twice in one rule")
        found[key] = value
    return found


def _rule(entry: dict[str, Any], where: str) -> Rule:
    for key in entry:
        if key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, 1)
            advice = f"did you mean {close[0]!r}? " if close else ""
            raise UsageError(f"{where}: unknown key {key!r}; {advice}Known keys: {', '.join(KEYS)}")
    kinds: dict[str, type] = {"match": str, "keep_float": bool, "reason": str}
    for key, kind in kinds.items():
        if key in entry and not isinstance(entry[key], kind):
            raise UsageError(f"{where}: {key} must be {'true or false' if kind is bool else 'a string'}")
    if not entry.get("match"):
        raise UsageError(f"{where}: key 'match' is missing or empty")
    changes = {key: entry[key] for key in _SCHEME_KEYS if key in entry}
    return Rule(entry["match"], changes, entry.get("keep_float", False), entry.get("reason", ""))


def decide(layers: Sequence[LinearInfo], scheme: LinearScheme, rules: Sequence[Rule] = ()) -> tuple[Decision, ...]:
    """Apply rules and guards.

    Args:
        layers: the layers in the blocks.
        scheme: for all that nothing else is said of.
        rules: the user's, the first that matches a layer decides.

    Returns:
        One decision per layer, in their order.

    Raises:
        UsageError: a rule matches no layer.
        SpecError: a rule's group size does not divide the K of a layer it matches.
    """
    check_time([rule.match for rule in rules], [info.name for info in layers])
    decisions = tuple(_decide(info, scheme, rules) for info in layers)
    used = {decision.by for decision in decisions}
    for rule in rules:
        if rule.match in used:
            continue
        hidden = next((d for d in decisions if re.search(rule.match, d.info.name)), None)
        if hidden is not None:
            raise UsageError(
                f"rule {rule.match!r} decides no layer: an earlier rule, {hidden.by!r}, takes all it matches"
            )
        raise UsageError(
            f"rule {rule.match!r} matches no layer; layers are named as in {layers[0].name!r}, "
            "and embeddings and lm_head follow embedding_bits"
        )
    return decisions


def _decide(info: LinearInfo, scheme: LinearScheme, rules: Sequence[Rule]) -> Decision:
    rule = next((rule for rule in rules if re.search(rule.match, info.name)), None)
    if rule is None:
        guard = next((reason for pattern, reason in _GUARDS if re.search(pattern, info.name)), None)
        if guard is not None:
            return Decision(info, None, "guard", guard)
        spec, reason = fitting(scheme.spec({}), info.in_features)
        return Decision(info, spec, "guard" if reason else "default", reason)
    if rule.keep_float:
        return Decision(info, None, rule.match, rule.reason or "a rule keeps it float")
    spec = scheme.spec(rule.changes)
    if "group_size" in rule.changes:
        spec.groups(info.in_features, info.name)
        return Decision(info, spec, rule.match, rule.reason, "bits" in rule.changes)
    spec, reason = fitting(spec, info.in_features)
    return Decision(info, spec, rule.match, "; ".join(filter(None, (rule.reason, reason))), "bits" in rule.changes)


def fitting(spec: QuantSpec, width: int) -> tuple[QuantSpec, str]:
    """The scheme with a group size that divides K, and why it is another one (or nothing)."""
    asked = spec.group_size
    if asked is None or width % asked == 0:
        return spec, ""
    group = max((size for size in GROUP_SIZES if size < asked and width % size == 0), default=None)
    fallback = "the whole row" if group is None else f"group size {group}"
    return dataclasses.replace(spec, group_size=group), f"{asked} does not divide K={width}: {fallback}"


def other_groups(asked: int | None, used: Sequence[tuple[QuantSpec, int]]) -> str:
    """What layers have another group size than the one asked for, in words; empty where none has.

    Args:
        asked: the group size asked for.
        used: scheme and K of every layer.
    """
    counts = Counter(
        (spec.group_size, width) for spec, width in used if spec.group_size != asked and asked and width % asked
    )
    return "; ".join(
        f"{count} of {len(used)} layers: {'whole rows' if group is None else f'group {group}'} "
        f"(asked {asked} does not divide K={width})"
        for (group, width), count in counts.items()
    )


def rows(decisions: Sequence[Decision]) -> list[dict[str, Any]]:
    """A table of what every rule and guard took: one row per rule, scheme and reason, in order of first use."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for decision in decisions:
        scheme = "float" if decision.spec is None else decision.spec.describe()
        groups.setdefault((decision.by, scheme, decision.reason), []).append(decision.info.name)
    return [
        {"rule": by, "scheme": scheme, "layers": len(names), "first": names[0], "reason": reason}
        for (by, scheme, reason), names in groups.items()
    ]
