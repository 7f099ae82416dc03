"""The report: one HTML file with everything in it, readable without a script, a network or a mouse.

    in short · what was done · bits per layer · error per layer · what was lost · size, loss and speed · time ·
    environment · what was not recorded

Packages that were made from the same artifact share what is about the artifact.  Nothing in the file depends on when
or where it was made: the same records give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from importlib.metadata import version

from roundexport.types import HEADLESS, PAIRS

from . import accuracy, story
from .figure_plots import Point, Spread, frontier, histogram
from .html_parts import NARROW, both, halves, key, page, pairs, paragraph, section, table, tiles
from .layer_plots import bits_of, bits_picture, loss_pictures, losses_of, losses_told, summary, told
from .numbers import at, mebibytes, number, percent, short, spread
from .page_style import STYLE
from .records import PackageRecord, Timing
from .svg import Drawing

_TILE = 320.0
_BESIDE = 3  # packages in one table, at most


def report_page(records: Sequence[PackageRecord], timings: Sequence[Timing]) -> str:
    """The document.

    Args:
        records: packages, in the order in which they are shown.
        timings: of all benchmarks, contestants that are no package of these included.
    """
    names = list(dict.fromkeys(record.source.name for record in records))
    title = f"{', '.join(names)}: {_count(len(records), 'package')}"
    groups = _groups(records)
    return page(
        title,
        STYLE,
        f"<h1>{escape(title)}</h1>",
        paragraph("Weights rounded to few bits, and what that cost. Made by roundexport report.", "note"),
        section("In short", _short(records), *_failed(records)),
        section("What was done", *(_done(group, len(groups) > 1) for group in groups)),
        section("Bits per layer", *(_bits(group, len(groups) > 1) for group in groups)),
        section("Error per layer, before and after", *(_errors(group, len(groups) > 1) for group in groups)),
        section("What was lost", *_lost(records)),
        section("Size, loss and speed", *_frontiers(records)),
        section("Time", *_times(_renamed(records, timings))),
        section("Environment", *_environment(records, timings)),
        section("Not recorded", *_missing(records)),
    )


def _count(number_of: int, noun: str) -> str:
    return f"{number_of} {noun}{'' if number_of == 1 else 's'}"


def _groups(records: Sequence[PackageRecord]) -> list[list[PackageRecord]]:
    """Packages by the artifact that they were made from."""
    found: dict[str, list[PackageRecord]] = {}
    for record in records:
        found.setdefault(str(record.manifest.source["artifact"]), []).append(record)
    return list(found.values())


def _named(group: Sequence[PackageRecord]) -> str:
    return ", ".join(record.label for record in group)


def _heading(group: Sequence[PackageRecord], several: bool) -> str:
    return f"<h3>{escape(_named(group))}</h3>" if several else ""


def _short(records: Sequence[PackageRecord]) -> str:
    logits = all(record.manifest.task not in HEADLESS for record in records)
    columns = ["package", "size", "bits per weight", *(["KL, nats", "top-1"] if logits else ["cosine"]), "speed"]
    return table(columns, (_short_row(record, logits) for record in records))


def _short_row(record: PackageRecord, logits: bool) -> list[str]:
    quality = at(record.verification, "quality")
    same = at(quality, "top1" if record.manifest.task in ("generate", *PAIRS) else "agreement", "mean")
    figures = [spread(at(quality, "kl")), percent(number(same))] if logits else [spread(at(quality, "cosine"))]
    return [record.label, mebibytes(record.size), short(record.bits_per_weight), *figures, _speed(record)]


def _speed(record: PackageRecord) -> str:
    best = _best(record)
    unit = "tokens/s" if record.manifest.task == "generate" else "texts/s"
    return "–" if best is None else f"{short(number(best.speed), 3)} {unit}"


def _best(record: PackageRecord, like: Timing | None = None) -> Timing | None:
    """The fastest of a package's engines, under the conditions of ``like``, or of the package's first timing."""
    known = [timing for timing in record.timings if number(timing.speed) is not None]
    same = [timing for timing in known if timing.conditions == (like or known[0]).conditions]
    return max(same, key=lambda timing: number(timing.speed) or 0.0, default=None)


def _failed(records: Sequence[PackageRecord]) -> Iterator[str]:
    for record in records:
        for gate in accuracy.gates(record.verification or {}):
            yield paragraph(f"Gate failed, {record.label}: {gate}", "warn")


def _done(group: Sequence[PackageRecord], several: bool) -> str:
    first = group[0]
    if len(group) == 1:
        return _heading(group, several) + pairs([*story.made(first), *story.exported(first)])
    own = "".join(f"<h4>{escape(record.label)}</h4>{pairs(story.exported(record))}" for record in group)
    return _heading(group, several) + pairs(story.made(first)) + own


def _bits(group: Sequence[PackageRecord], several: bool) -> str:
    bits = bits_of(group[0])
    if not bits:
        return ""
    shades = [(f"b{count}", told(count)) for count in sorted(set(bits.values()))]
    said = f"{summary(bits)}. A column is a block of the model, a row a kind of layer."
    drawing = both(lambda width: bits_picture(bits, width))
    reasons = sorted({reason for _, reason in group[0].manifest.kept_float})
    kept = paragraph(f"Kept float: {'; '.join(reasons)}.", "note") if reasons else ""
    return _heading(group, several) + paragraph(said) + key(shades) + drawing + kept


def _errors(group: Sequence[PackageRecord], several: bool) -> str:
    losses = losses_of(group[0])
    if not losses:
        return ""
    said = f"{story.measure_of(group[0])}; block after block from left to right, one scale for all."
    keys = key([("i-before", "before: rounded to nearest"), ("i-after", "after tuning")])
    rows = table(["median of", "before", "after", "ratio"], losses_told(losses), wraps=False)
    capital = said[0].upper() + said[1:]
    return _heading(group, several) + paragraph(capital) + keys + tiles(loss_pictures(losses)) + rows


def _lost(records: Sequence[PackageRecord]) -> Iterator[str]:
    spreads = [(record, Spread.recorded(at(record.verification, "quality", "kl_histogram"))) for record in records]
    shown = [(record, found) for record, found in spreads if found is not None]
    if shown:
        ends = [found.between() for _, found in shown]
        low, high = min(a for a, _ in ends), max(b for _, b in ends)
        width = _TILE if len(shown) > 1 else NARROW
        yield paragraph("KL of single tokens, in nats on a logarithmic axis; a bar's height is its share of tokens.")
        drawings = [(record.label, _kl(record, found, width, (low, high))) for record, found in shown]
        if len(shown) == 1:
            record, found = shown[0]
            yield both(lambda wide: _kl(record, found, wide, (low, high)))
        else:
            yield halves(drawings)
    known = [record for record in records if record.verification is not None]
    beside = -(-len(known) // max(1, -(-len(known) // _BESIDE)))
    for start in range(0, len(known), max(1, beside)):
        yield _figures(known[start : start + beside])


def _figures(records: Sequence[PackageRecord]) -> str:
    """All figures of a few packages, beside each other."""
    found = [{line.name: line for line in accuracy.lines(record.verification or {})} for record in records]
    names = list(dict.fromkeys(name for lines in found for name in lines))
    rows = [[name, *(lines[name].value if name in lines else "–" for lines in found)] for name in names]
    meanings = [next(lines[name].meaning for lines in found if name in lines) for name in names]
    texts = dict.fromkeys(accuracy.text_of(record.verification or {}) for record in records)
    said = paragraph(f"Held-out text: {', '.join(texts)}.", "note")
    return table(["", *(record.label for record in records)], rows, meanings) + said


def _kl(record: PackageRecord, found: Spread, width: float, ends: tuple[float, float]) -> Drawing:
    quality = at(record.verification, "quality")
    marks = [("mean", number(at(quality, "kl", "mean"))), ("99 % below", number(at(quality, "kl_p99")))]
    known = [(word, value) for word, value in marks if value is not None and value > 0]
    return histogram(found, width, f"KL per token of {record.label}", "nats", ends, known)


def _frontiers(records: Sequence[PackageRecord]) -> Iterator[str]:
    known = [(record, accuracy.lost(record.verification or {})) for record in records]
    sized = [Point(record.label, record.size / 2**20, loss) for record, loss in known if loss is not None]
    if len(sized) < 2:
        return
    loss = "KL, nats" if all(record.manifest.task not in HEADLESS for record in records) else "1 − cosine"
    yield paragraph("Left and down is better; the line joins packages that no other beats in both.")
    yield both(lambda width: frontier(sized, width, "MiB", loss, smaller=True))
    first = next((best for record, _ in known if (best := _best(record)) is not None), None)
    if first is None:
        return
    timed = [(record.label, value, _best(record, first)) for record, value in known if value is not None]
    fast = [
        Point(label, speed, value)
        for label, value, best in timed
        if best is not None and (speed := number(best.speed)) is not None
    ]
    if len(fast) > 1:
        unit = "tokens/s" if loss.startswith("KL") else "texts/s"
        yield paragraph(f"Right and down is better. Speed of each package's fastest engine, {first.told()}.")
        yield both(lambda width: frontier(fast, width, unit, loss, smaller=False))


def _renamed(records: Sequence[PackageRecord], timings: Sequence[Timing]) -> list[Timing]:
    """Contestants by the names that their packages have here; of others that are paths, the end."""
    labels = {id(timing): record.label for record in records for timing in record.timings}
    shown = []
    for timing in timings:
        name, *engine = timing.contestant.split(" · ")
        name = labels.get(id(timing), "/".join(name.split("/")[-2:]))
        shown.append(replace(timing, contestant=" · ".join([name, *engine])))
    return shown


def _times(timings: Sequence[Timing]) -> Iterator[str]:
    for shape in dict.fromkeys(timing.told() for timing in timings):
        own = [timing for timing in timings if timing.told() == shape]
        decoders = "prompt_len" in own[0].shape
        yield f"<h3>{escape(shape)}</h3>"
        yield table(*(_decoder_times(own) if decoders else _encoder_times(own)))
        spread_out = [timing for timing in own if len(timing.gaps) >= 8 and min(timing.gaps) > 0]
        if spread_out:
            low = min(min(timing.gaps) for timing in spread_out)
            high = max(sorted(timing.gaps)[int(0.995 * (len(timing.gaps) - 1))] for timing in spread_out)
            what = "between tokens" if decoders else "per call"
            yield paragraph(f"Milliseconds {what}; the last bar holds what took longer.", "note")
            yield halves((timing.contestant, _gaps(timing, low, high)) for timing in spread_out)


def _gaps(timing: Timing, low: float, high: float) -> Drawing:
    ends = (low / 1.03, high * 1.06)
    found = Spread.of(timing.gaps, ends[0], high)
    middle = sorted(timing.gaps)[len(timing.gaps) // 2]
    marks = [("median", middle), *_percentile(timing)]
    return histogram(found, _TILE, f"Time of {timing.contestant}", "ms", ends, marks)


def _percentile(timing: Timing) -> list[tuple[str, float]]:
    value = number(timing.row.get("itl_p99_ms"))
    return [] if value is None else [("99 % below", value)]


def _decoder_times(timings: Sequence[Timing]) -> tuple[list[str], list[list[str]]]:
    columns = ["package", "first token, ms", "tokens/s", "ms per token, 50 / 90 / 99 %", "memory, MiB", "KL, nats"]
    rows, several = [], len({over for timing in timings if (over := timing.row.get("kl_over"))}) > 1
    for timing in timings:
        row = timing.row
        share = " / ".join(short(number(row.get(f"itl_p{q}_ms")), 3) for q in (50, 90, 99))
        figures = [short(number(row.get(key)), 3) for key in ("ttft_ms", "decode_tps")]
        rows.append(
            [
                timing.contestant,
                *figures,
                share,
                short(number(row.get("peak_rss_mib"))),
                short(number(row.get("kl")), 3) + (f" over {over}" if several and (over := row.get("kl_over")) else ""),
            ]
        )
    return columns, rows


def _encoder_times(timings: Sequence[Timing]) -> tuple[list[str], list[list[str]]]:
    columns = ["package", "ms per call", "texts/s", "memory, MiB"]
    keys = ("latency_ms", "texts_per_s", "peak_rss_mib")
    return columns, [[t.contestant, *(short(number(t.row.get(key))) for key in keys)] for t in timings]


def _environment(records: Sequence[PackageRecord], timings: Sequence[Timing]) -> Iterator[str]:
    for record in records:
        several = len(records) > 1
        yield (f"<h3>{escape(record.label)}</h3>" if several else "") + pairs(story.environment(record))
    machines = {str(timing.machine): timing for timing in timings}
    for timing in machines.values():
        engines = {t.engine: story.engine_line(t.info) for t in timings if str(t.machine) == str(timing.machine)}
        ran = [(f"timed with {name}", line) for name, line in engines.items() if line]
        yield f"<h3>Benchmark</h3>{pairs([*story.machine(timing), *ran])}"
    yield paragraph(f"Report by roundexport {version('roundexport')}.", "note")


def _missing(records: Sequence[PackageRecord]) -> Iterator[str]:
    for record in records:
        for entry in record.missing:
            command = f"<pre><code>{escape(entry.command)}</code></pre>"
            yield paragraph(f"{record.label}: {entry.what}. This records it:") + command
