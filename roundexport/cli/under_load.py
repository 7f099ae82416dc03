"""`bench --concurrency` and `bench --rate`: servers under load, from the words of the command line to a table."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from roundexport.errors import UsageError

from . import printing
from .shared_options import listed

Concurrency = Annotated[
    str | None, typer.Option(help="Serve the packages and let so many users ask, each after its answer: 1,8,32.")
]
Rate = Annotated[str | None, typer.Option(help="Or let requests come at so many per second, by chance: 0.5,2.")]
Duration = Annotated[float, typer.Option(help="With --concurrency or --rate: seconds of each.")]
Url = Annotated[
    list[str] | None, typer.Option(help="A running server to take part, as http://127.0.0.1:8000/v1; may be repeated.")
]


@dataclass(frozen=True)
class LoadOptions:
    """What the command line says of load; the first three belong together.

    Args:
        concurrency: numbers of users.
        rate: requests per second.
        duration: seconds per level.
        urls: running servers.
    """

    concurrency: str | None
    rate: str | None
    duration: float
    urls: Sequence[str]

    @property
    def wanted(self) -> bool:
        """Whether load was asked for."""
        return self.concurrency is not None or self.rate is not None or bool(self.urls)


def bench_servers(  # noqa: PLR0913  (the parameters are the verb's flags)
    packages: Sequence[Path],
    options: LoadOptions,
    *,
    prompt_lens: Sequence[int],
    output_len: int,
    seed: int,
    engine: str,
    device: str,
    threads: int | None,
    properties: Mapping[str, str],
    format: str,
) -> None:
    """Put load on servers and print what came of it.

    Raises:
        UsageError: neither users nor a rate, what is not a number, or a format that load has not.
    """
    from roundexport.runtime.benchmarking.arrivals import Level
    from roundexport.runtime.benchmarking.under_load import Demand, bench_under_load

    if options.concurrency is None and options.rate is None:
        raise UsageError("--url needs --concurrency or --rate: how much is the server to be asked?")
    if format == "markdown":
        raise UsageError("--format markdown is for packages timed alone; under load: table, json, jsonl or csv")
    levels = [Level(users=users) for users in listed(options.concurrency, "--concurrency", int)]
    levels += [Level(rate=rate) for rate in listed(options.rate, "--rate", float)]
    demand = Demand(tuple(levels), options.duration, tuple(prompt_lens), output_len, seed)
    report = bench_under_load(
        packages, demand, urls=options.urls, engine=engine, device=device, threads=threads,
        properties=properties, on_progress=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    if format == "json":
        printing.document(report.to_json())
    elif format == "table":
        printing.rich_table(report.table())
    else:
        print(report.to_csv() if format == "csv" else report.to_jsonl(), end="")
