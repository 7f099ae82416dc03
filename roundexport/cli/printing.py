r"""What the verbs print on stdout: lines, tables, and one JSON document with ``--json``.

Names of layers, files and models come from folders that strangers wrote.  They are printed as text: square brackets
are never markup, and a character that does not print (an escape sequence that would move the cursor, a mark that
reverses the reading direction) is shown as its escape, as in ``\x1b``.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from roundexport.errors import GateError, RoundexportError

if TYPE_CHECKING:
    from roundexport.conversion.convert import Conversion
    from roundexport.conversion.inspection import Inspection
    from roundexport.conversion.vision_language import WholeConversion
    from roundexport.targets.interface import ExportReport
    from roundexport.verification.report import ActivationCost, QualityReport

_WIDTH_OF_A_FILE = 180
_MOST = 10  # products told of; --json has all
_LEFT = {"layer", "scheme", "rule", "operator"}


def printable(text: str, keep: str = "") -> str:
    """The text with every character that does not print, but those in ``keep``, written as its escape."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def survive_narrow_encodings() -> None:
    """Print a question mark where the terminal's encoding lacks a character, and do not fail."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def line(text: str) -> None:
    """One line on stdout; on a terminal that is narrower, broken between words and indented."""
    text = printable(text)
    if sys.stdout.isatty():
        indent = " " * (len(text) - len(text.lstrip()) + 2)
        text = textwrap.fill(
            text, shutil.get_terminal_size().columns, subsequent_indent=indent, replace_whitespace=False,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    print(text)


def command(text: str) -> None:
    """A command to copy, never broken."""
    print(printable(text))


def failure(text: str) -> None:
    """An error's message on stderr."""
    print("roundexport: " + printable(text, keep="\n\t"), file=sys.stderr)


def piece(text: str) -> None:
    """A piece of a model's answer, at once; on a terminal without the characters that would command it."""
    print(printable(text, keep="\n\t\u200c\u200d") if sys.stdout.isatty() else text, end="", flush=True)


def document(value: Any) -> None:
    """One JSON document."""
    print(json.dumps(value, indent=1, default=str))


def table(rows: Iterable[Mapping[str, Any]], title: str | None = None) -> None:
    """Rows with the same keys as a table; nothing without rows."""
    rows = list(rows)
    if not rows:
        return
    made = Table(title=None if title is None else Text(printable(title)), title_justify="left")
    for column in rows[0]:
        made.add_column(Text(printable(column)), justify="left" if column in _LEFT else "right")
    for row in rows:
        made.add_row(*(Text(cell(value)) for value in row.values()))
    rich_table(made)


def rich_table(made: Table) -> None:
    """A table, as wide as the terminal; in a file wide enough not to be cut."""
    Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE, markup=False).print(made)


def cell(value: Any) -> str:
    """A value as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if type(value) is int else printable(str(value))


def inspection(found: Inspection) -> None:
    """What `inspect` tells of a folder."""
    line(found.kind)
    for name, value in found.facts.items():
        line(f"  {name:18s} {cell(value)}")
    table(found.rows)


def notes(sentences: Iterable[str]) -> None:
    """What was decided for the user."""
    for sentence in dict.fromkeys(sentences):
        line(f"  note   {sentence}")


def exported(out: Path, target: str, report: ExportReport) -> None:
    """What `export` wrote, kept float and fused."""
    size = sum(report.files.values()) / 2**20
    line(f"{out}: {target}, {len(report.exported)} layers equal to the artifact, {size:.1f} MiB")
    notes(report.notes)
    if report.outputs is not None:
        line(f"  {report.outputs}")
    for reason, names in _grouped(report.kept_float).items():
        line(f"  float  {_few(names)}: {reason}")
    for rule, reasons in _grouped((reason, rule) for rule, reason in report.refused).items():
        line(f"  not    {rule}: {_few(reasons)}")
    for rule, count in report.fusions.items():
        line(f"  fused  {rule} ×{count}")


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """First halves of the pairs by their common second half."""
    groups: dict[str, list[str]] = {}
    for first, second in pairs:
        groups.setdefault(second, []).append(first)
    return groups


def _few(names: list[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def converted(done: Conversion | WholeConversion) -> None:
    """A conversion, or one of each part of a model: notes, proofs, losses, and what it made."""
    from roundexport.conversion.convert import Conversion

    for part in _conversions(done):
        notes(note for made in part.exports.values() for note in made.notes)
        for name, made in part.exports.items():
            line(f"{part.packages[name]}: {made.outputs}")
        qualities({str(part.packages[name]): report for name, report in part.quality.items()})
        summary(part)
    if not isinstance(done, Conversion):
        for name, package in done.packages.items():
            line(f"{package}: reads text and pictures, {name}")


def check_gates_held(done: Conversion | WholeConversion) -> None:
    """Fail if a verification gate of a conversion did not hold.

    Raises:
        GateError: one did not; the text names all that did not.
    """
    reports = [pair for part in _conversions(done) for pair in part.quality.items()]
    failures = [f"{name}: {failed}" for name, report in reports for failed in report.failures]
    if failures:
        raise GateError("; ".join(failures))


def _conversions(done: Conversion | WholeConversion) -> tuple[Conversion, ...]:
    from roundexport.conversion.convert import Conversion

    return (done,) if isinstance(done, Conversion) else tuple(done.parts.values())


def summary(done: Conversion) -> None:
    """What a conversion made, in three lines: what came out, where it is, and how to talk to it."""
    sizes = {name: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for name, path in
             done.packages.items()}  # fmt: skip
    found = [f"{name} {sizes[name] / 2**20:.1f} MiB{_losses(done.quality.get(name))}" for name in done.packages]
    bits = f"{done.bits_per_weight:.3f} bits per weight; " if done.bits_per_weight else ""  # none: w8a8 changes nothing
    line(f"{bits}{'; '.join(found)}")
    kept = "the integers" if bits else "the model as it was"
    line(f"in {', '.join(str(path) for path in done.packages.values())}; {kept} in {done.artifact}")
    for name, why in done.left_out.items():
        line(f"LEFT OUT: {name} cannot take this model: {why}")
    first = next(iter(done.packages.values()))
    if (first / "roundexport.json").is_file():
        command(_command(first))


def _losses(report: QualityReport | None) -> str:
    from roundexport.verification.report import DecoderQuality, HeadQuality

    if report is None:
        return ""
    q = report.quality
    if isinstance(q, DecoderQuality):
        return f", KL {q.kl.mean:.4f} nats, top-1 {q.top1.mean:.1%}".replace("%", " %")
    if isinstance(q, HeadQuality):
        same = "same label" if q.labels > 1 else "same order"
        return f", KL {q.kl.mean:.4f} nats, {same} {q.agreement.mean:.1%}".replace("%", " %")
    return f", cosine {q.cosine.mean:.4f}"


def _command(package: Path) -> str:
    """The command that uses a package."""
    import shlex

    from roundexport.formats.package import read_package
    from roundexport.runtime.tokenizer import Tokenizer

    where = shlex.quote(str(package))
    task = read_package(package, check_hashes=False).task
    looked_at = f"from roundexport.runtime import load; print(load({str(package)!r}).embed(['image.jpg']))"
    simple: dict[str, str] = {
        "embed": f"roundexport bench {where}",
        "embed_image": f"python -c {shlex.quote(looked_at)}",
        "classify_image": f"roundexport classify {where} image.jpg",
        "rerank": f'roundexport classify {where} "A text." --query "A question."',
        "translate": f'roundexport generate {where} --prompt "A text."',
        "transcribe": f"roundexport transcribe {where} speech.wav",
        "ctc": f"roundexport transcribe {where} speech.wav",
    }
    if task in simple:
        return simple[task]
    if task != "generate":
        query = '--query "A question?" ' if _one_label(package) else ""
        return f'roundexport classify {where} {query}"A text."'
    try:
        chat = " --chat" if Tokenizer(package).has_chat_template else ""
    except RoundexportError:
        chat = ""
    return f'roundexport generate {where}{chat} --prompt "What is the capital of France?"'


def _one_label(package: Path) -> bool:
    import json

    return len(json.loads((package / "config.json").read_text("utf-8")).get("id2label", {})) == 1


def qualities(reports: Mapping[str, QualityReport]) -> None:
    """Figures of packages against the float model."""
    for name, report in reports.items():
        _quality(name, report)


def _quality(name: str, report: QualityReport) -> None:
    from roundexport.verification.report import DecoderQuality, HeadQuality

    q = report.quality
    threads = report.engine.get("threads")
    with_threads = f", {threads} thread{'s' if threads > 1 else ''}" if isinstance(threads, int) else ""
    line(f"{name}  on {report.engine.get('engine')}{with_threads}, held-out text: {report.text}")
    if report.integers_checked:
        line(f"  integers read back   {report.integers_checked} layers, all equal")
    if isinstance(q, DecoderQuality):
        line(f"  KL(float ‖ package)  mean {q.kl} nats, p99 {q.kl_p99:.4f}, max {q.kl_max:.4f} ({q.tokens} tokens)")
        line(f"  top-1 agreement      {q.top1}")
        line(f"  perplexity           {q.perplexity:.3f} (float {q.perplexity_float:.3f})")
        if q.first_divergence:
            line(f"  greedy agrees for    {list(q.first_divergence)} of {q.divergence_horizon} tokens")
    elif isinstance(q, HeadQuality):
        if q.labels > 1:
            line(f"  likeliest label      same in {q.agreement} ({q.texts} texts, {q.labels} labels)")
        else:
            line(f"  order of two texts   same in {q.agreement} (all pairs of {q.texts})")
        line(f"  KL over the labels   mean {q.kl} nats")
        line(f"  logit error          mean {q.logit_error} of the logits' standard deviation")
    else:
        line(f"  cosine               mean {q.cosine}, least {q.cosine_min:.5f} ({q.texts} texts)")
        line(f"  rank correlation     {q.rank_correlation:.5f}")
        line(f"  same neighbor        {q.same_neighbour:.4f}")
    if report.activations is not None:
        _activations(report.activations)
    for reason in report.failures:
        line(f"  GATE FAILED          {reason}")


def _activations(cost: ActivationCost) -> None:
    """The products that lose most by activations in eight bits."""
    if not cost.added:
        line("  8-bit activations    cost nothing here: the runtime rounds none on this processor")
        return
    line(f"  8-bit activations    {cost.together} nats, of the package in float32 to itself ({cost.tokens} tokens)")
    line(f"                       {len(cost.products)} products, each alone, add up to {cost.added:.5f}; most lose:")
    table({"layer": product.label, "nats": f"{product.kl.mean:.6f} ± {product.kl.stderr:.6f}",
           "share": f"{product.kl.mean / cost.added:.1%}".replace("%", " %")}
          for product in cost.products[:_MOST])  # fmt: skip
    if cost.spared:
        line(f"  float32 already      {_few(list(cost.spared))}")
