"""Options that more than one verb has, each said once: the same flag, the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from roundexport.errors import UsageError

LOADING = "loading torch and transformers"  # the stage that every verb of theirs begins with

Number = TypeVar("Number", int, float)

Threads = Annotated[
    int | None, typer.Option("-t", "--threads", help="Default: physical cores inside affinity and CPU quota.")
]
Cluster = Annotated[
    str | None,
    typer.Option(
        help="Share the tuning: local:N processes here, auto (the Ray cluster here), or ray://HOST:PORT; "
        "with @URL behind it through an object store. --max-ram is the limit of each process."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
HeldOut = Annotated[
    Path | None, typer.Option(help="Held-out text for verification; default: the one that comes with this package.")
]
MaxKl = Annotated[float | None, typer.Option(help="Gate: mean KL in nats per token, or text of a head.")]
MinTop1 = Annotated[float | None, typer.Option(help="Gate: agreement of the likeliest token or label, 0 to 1.")]
MinCosine = Annotated[float | None, typer.Option(help="Gate for encoders: mean cosine.")]
Engine = Annotated[str, typer.Option(help="auto, or one of: roundexport list engines.")]
RuntimeDevice = Annotated[str, typer.Option(help="CPU, or one of: roundexport list devices.")]
MaxRam = Annotated[
    float | None, typer.Option(help="GiB of memory to stay within; what takes more is refused before it begins.")
]
Properties = Annotated[
    list[str] | None,
    typer.Option(
        "--property",
        metavar="NAME=VALUE",
        help="What OpenVINO's plugin is told, as KV_CACHE_PRECISION=u8; may be repeated.  The package keeps no record.",
    ),
]
Precise = Annotated[bool, typer.Option(help="float32 throughout, not as shipped.")]
InputsEmbeds = Annotated[
    bool,
    typer.Option(
        "--inputs-embeds",
        help="Of a decoder: its graph reads vectors, and its table of tokens is a graph of its own.",
    ),
]
Kernels = Annotated[
    bool,
    typer.Option(
        "--kernels",
        help="ONNX: products by roundexport's own operator, faster and for our runtime alone. Build it first, and "
        "wherever the package is opened: python -m roundexport.kernels.native.build.",
    ),
]
Part = Annotated[
    str | None, typer.Option(help="Of a folder that holds several models, the one that is taken: text or vision.")
]


def named_values(given: list[str] | None, option: str) -> dict[str, str]:
    """Names and values of an option that is repeated.

    Raises:
        UsageError: one is no NAME=VALUE, or a name comes twice.
    """
    pairs = [text.partition("=") for text in given or ()]
    wrong = next(
        (text for text, (name, _, value) in zip(given or (), pairs, strict=True) if not (name and value)), None
    )
    if wrong is not None:
        raise UsageError(f"{option} takes NAME=VALUE, not {wrong!r}")
    found = {name: value for name, _, value in pairs}
    if len(found) < len(pairs):
        raise UsageError(f"{option} was given twice for one name: {', '.join(given or ())}")
    return found


def listed(given: str | None, option: str, kind: type[Number]) -> list[Number]:
    """The numbers of an option that takes several, separated by commas; none where it is not given.

    Raises:
        UsageError: one is not a number of that kind.
    """
    try:
        return [kind(part) for part in given.split(",")] if given is not None else []
    except ValueError:
        numbers = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"{option} takes {numbers} separated by commas, not {given!r}") from None
