"""A benchmark beside an earlier one: refused where anything but the packages differs.

    machine       processor, instruction sets, cores, quota, system, versions of all libraries but roundexport's own
    settings      threads, device, precise, seed
    contestants   of the same name: engine, version, threads, device, precisions

Two runs never meet the same moment, so their ratio holds the drift of the machine too; the measured read bandwidth of
both stands beside it.  What is to be told apart within a few percent belongs into one run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from roundexport.errors import ArtifactError, UsageError
from roundexport.storage.strict_json import parse

_MACHINE = ("cpu", "instruction_sets", "physical_cores", "cpu_quota", "logical_cores", "system", "versions")
_SETTINGS = ("threads", "device", "precise", "seed")
_CONTESTANT = ("engine", "version", "threads", "device", "precise", "precision")
_OWN = "roundexport"  # whose change is what one wants to see
_SHAPE = ("prompt_len", "output_len", "text_len", "batch_size")
_FIGURES = ("ttft_ms", "tpot_ms", "decode_tps", "latency_ms", "texts_per_s")
_KEYS = ("machine", "settings", "contestants", "rows")


def read_record(path: Path) -> dict[str, Any]:
    """A benchmark's JSON document.

    Raises:
        UsageError: there is none.
    """
    try:
        record = parse(path.read_bytes(), str(path))
    except (OSError, ArtifactError) as error:
        raise UsageError(f"{path} cannot be read as a benchmark's JSON document: {error}") from error
    if missing := [key for key in _KEYS if key not in record]:
        raise UsageError(f"{path} is not a benchmark's JSON document (bench --format json): it has no {missing[0]}")
    return record


def refuse_other(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> None:
    """Refuse a record of another machine, other settings or other engines.

    Args:
        old: the earlier record.
        new: the later one; of it ``contestants`` may be missing, as before anything was started.
        where: the earlier record's file.

    Raises:
        UsageError: names every difference, with both values.
    """
    problems = list(_differences(old, new))
    if problems:
        raise UsageError(
            f"{where} cannot be compared with this run: {'; '.join(problems)}. Run both again, in one bench"
        )


def compare(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Figures of both records side by side, for contestants and shapes that both have.

    Raises:
        UsageError: the records cannot be compared, or have nothing in common.
    """
    refuse_other(old, new, where)
    before = {_place(row): row for row in old["rows"]}
    both = [(before[_place(row)], row) for row in new["rows"] if _place(row) in before]
    if not both:
        raise UsageError(f"{where} has no contestant and shape of this run; it has {sorted(map(str, before))[:4]}")
    return [_beside(then, now) for then, now in both]


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for part, keys in (("machine", _MACHINE), ("settings", _SETTINGS)):
        for key in keys:
            yield from _difference(key, old[part].get(key), new[part].get(key))
    told = [record["settings"].get("properties", {}) for record in (old, new)]  # older records know of none
    yield from _difference("properties", *told)
    before = {entry["name"]: entry["info"] for entry in old["contestants"]}
    for entry in new.get("contestants", ()):
        if (then := before.get(entry["name"])) is not None:
            for key in _CONTESTANT:
                yield from _difference(f"{entry['name']}: {key}", then.get(key), entry["info"].get(key))


def _difference(what: str, then: Any, now: Any) -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            if what != "versions" or key != _OWN:
                yield from _difference(f"{what} {key}", then.get(key), now.get(key))
    elif _plain(then) != _plain(now):
        yield f"{what} was {_plain(then)}, is {_plain(now)}"


def _plain(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["contestant"], *(row.get(key) for key in _SHAPE)


def _beside(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    shape = {key: now[key] for key in ("contestant", *_SHAPE) if key in now}
    figures: dict[str, Any] = {}
    for key in _FIGURES:
        if key in now and key in then:
            figures |= {f"{key}_before": then[key], key: now[key], f"{key}_ratio": now[key] / then[key]}
    return {**shape, **figures}
