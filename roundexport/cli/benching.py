"""The verb `bench`: packages and rivals timed in turn, or one model's products; and a run beside an earlier one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from roundexport.errors import UsageError

from . import printing
from .shared_options import Json, Precise, Properties, RuntimeDevice, Threads, listed, named_values
from .under_load import Concurrency, Duration, LoadOptions, Rate, Url, bench_servers

if TYPE_CHECKING:
    from roundexport.runtime.benchmarking.report import BenchReport


def bench(  # noqa: PLR0913, PLR0917
    packages: Annotated[list[Path] | None, typer.Argument()] = None,
    kernels: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Time one token's products at this model's shapes instead.")
    ] = None,
    to: Annotated[str, typer.Option(help="With --kernels: whose kernels, onnx or openvino.")] = "onnx",
    prompt_lens: Annotated[
        str | None,
        typer.Option("-p", "--prompt-lens", help="Prompt lengths in tokens.  [default: 128,512, or what fits]"),
    ] = None,
    output_len: Annotated[int, typer.Option("-n", "--output-len", help="Tokens to write.")] = 64,
    rounds: Annotated[int, typer.Option("-r", "--rounds")] = 5,
    batch_sizes: Annotated[
        str | None, typer.Option(help="Texts per call, or prompts answered together.  [default: 1,8; decoders: 1]")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Several, each of which every package it opens is timed with: ort,ov,onnxruntime-genai,openvino-genai,"
            "openvino-genai-batching; and rivals: torch,torch-bfloat16,llama.cpp.  auto alone: all that are installed,"
            " and what load chooses by here is measured anew and kept.  [default: as load opens each package]"
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The float model for torch; default: where the first package is from.")
    ] = None,
    gguf: Annotated[Path | None, typer.Option(help="The file for llama.cpp.")] = None,
    device: RuntimeDevice = "CPU",
    threads: Threads = None,
    precise: Precise = False,
    properties: Properties = None,
    cold: Annotated[
        bool, typer.Option(help="First start each alone and from the disk, for cold load, first inference and memory.")
    ] = True,
    seed: int = 0,
    profile: Annotated[
        bool, typer.Option("--profile", help="Afterwards, in runs of their own: what every operator of decoders takes.")
    ] = False,
    concurrency: Concurrency = None,
    rate: Rate = None,
    duration: Duration = 30.0,
    url: Url = None,
    compare: Annotated[
        Path | None,
        typer.Option(help="JSON of an earlier bench to show this one beside; refused if machine or versions differ."),
    ] = None,
    format: Annotated[Literal["table", "json", "csv", "jsonl", "markdown"], typer.Option("--format")] = "table",
    json: Json = False,
) -> None:
    """Time packages and rivals against each other, in turn, each in its own process; ratios refer to the first.

    With --concurrency or --rate: serve each and time the servers under load.
    """
    if profile and (format in ("csv", "jsonl") or kernels is not None or concurrency or rate):
        raise UsageError("--profile is of packages timed in turn, and is shown as a table, in Markdown or in JSON")
    told = named_values(properties, "--property")
    if told and kernels is not None:
        raise UsageError("--property is of packages; --kernels times products without one")
    load = LoadOptions(concurrency, rate, duration, url or ())
    if load.wanted:
        bench_servers(
            packages or [], load, prompt_lens=listed(prompt_lens or "128,512", "--prompt-lens", int),
            output_len=output_len,
            seed=seed, engine=engine or "auto", device=device, threads=threads,
            properties=told, format="json" if json else format,
        )  # fmt: skip
        return
    if kernels is not None:
        _bench_kernels(kernels, to, rounds, threads, json or format == "json")
        return
    from roundexport.runtime import bench as run

    sizes = listed(batch_sizes, "--batch-sizes", int) or None
    earlier = None if compare is None else _earlier(compare, threads, device, precise, told, seed)
    report = run(
        packages or [], prompt_lens=listed(prompt_lens, "--prompt-lens", int) or None, output_len=output_len,
        rounds=rounds,
        batch_sizes=sizes, engine=engine, model=model, gguf=gguf, device=device, threads=threads,
        precise=precise, properties=told, cold=cold, seed=seed, profile=profile, on_progress=_tell,
    )  # fmt: skip
    document = json or format == "json"
    if not document:
        _print(report, format)
    compared = None if earlier is None else _compared(earlier, report.to_json(), str(compare), document)
    if document:
        printing.document({**report.to_json(), **({} if compared is None else {"compared": compared})})


def _print(report: BenchReport, format: str) -> None:
    from roundexport.runtime.benchmarking import bench_table
    from roundexport.runtime.benchmarking.profile import profile_rows

    if format == "table":
        for made in bench_table.tables(report):
            printing.rich_table(made)
    elif format == "markdown":
        print(bench_table.markdown(report), end="")
    else:
        print(report.to_csv() if format == "csv" else report.to_jsonl(), end="")
    for title, rows in profile_rows(report.profiles):
        printing.table(rows, title)


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def _earlier(
    path: Path, threads: int | None, device: str, precise: bool, properties: dict[str, str], seed: int
) -> dict[str, Any]:
    """An earlier record, refused at once where this run could not be compared with it."""
    from roundexport.environment.threads import choose_threads
    from roundexport.runtime import machine_info
    from roundexport.runtime.benchmarking.comparing import read_record, refuse_other

    record = read_record(path)
    settings = {
        "threads": choose_threads(threads).count, "device": device, "precise": precise, "properties": properties,
        "seed": seed,
    }  # fmt: skip
    refuse_other(record, {"machine": machine_info(), "settings": settings}, str(path))
    return record


def _compared(earlier: dict[str, Any], now: dict[str, Any], where: str, silent: bool) -> list[dict[str, Any]]:
    """Rows of both records; shown, unless they go into a document."""
    from roundexport.runtime.benchmarking.comparing import compare

    rows = compare(earlier, now, where)
    if not silent:
        speeds = [record["machine"]["read_bandwidth_gbps"] for record in (earlier, now)]
        drift = f"small differences are the machine's: it read {speeds[0]} GB/s then, {speeds[1]} now"
        printing.table(rows, f"beside {where}; two runs, not in turn, so {drift}")
    return rows


def _bench_kernels(model: str, to: str, rounds: int, threads: int | None, json: bool) -> None:
    from roundexport.schemes.kernel_table import kernel_table
    from roundexport.schemes.kernel_timing import Bench

    bench = Bench(to, threads, 3 * rounds)
    rows = kernel_table(model, bench, on_progress=_tell, progress=True)
    if json:
        printing.document(rows)
    else:
        printing.table(rows, f"one token's product on {to}")
